"""torch's agent for tests, which loses and delays messages, under torch's name. Importing this registers it."""

from fastref.api import is_available
from fastref.rpc._testing import faulty_agent_backend_registry
from fastref.rpc._testing.agent import FaultyTensorPipeAgent, FaultyTensorPipeRpcBackendOptions

__all__ = [
    "FaultyTensorPipeAgent",
    "FaultyTensorPipeRpcBackendOptions",
    "faulty_agent_backend_registry",
    "is_available",
]
