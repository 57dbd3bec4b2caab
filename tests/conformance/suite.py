"""torch's test classes, made for fastref. Imported by the runner, by its forkserver, and so by every worker.

``torch.distributed.rpc`` is replaced before torch's tests are imported, and torch's own agent cannot be made any more.
"""

from __future__ import annotations

from typing import Any

import torch

from fastref import compat

compat.install()

import torch.multiprocessing  # noqa: E402
from torch.testing._internal.common_distributed import MultiProcessTestCase  # noqa: E402
from torch.testing._internal.distributed.nn.api.remote_module_test import (  # noqa: E402
    RemoteModuleTest,
    ThreeWorkersRemoteModuleTest,
)
from torch.testing._internal.distributed.rpc.dist_autograd_test import (  # noqa: E402
    DistAutogradTest,
    FaultyAgentDistAutogradTest,
    TensorPipeAgentDistAutogradTest,
)
from torch.testing._internal.distributed.rpc.dist_optimizer_test import DistOptimizerTest  # noqa: E402
from torch.testing._internal.distributed.rpc.examples.parameter_server_test import ParameterServerTest  # noqa: E402
from torch.testing._internal.distributed.rpc.examples.reinforcement_learning_rpc_test import (  # noqa: E402
    ReinforcementLearningRpcTest,
)
from torch.testing._internal.distributed.rpc.faulty_agent_rpc_test import FaultyAgentRpcTest  # noqa: E402
from torch.testing._internal.distributed.rpc.faulty_rpc_agent_test_fixture import FaultyRpcAgentTestFixture  # noqa: E402
from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture  # noqa: E402
from torch.testing._internal.distributed.rpc.rpc_test import RpcTest, TensorPipeAgentRpcTest  # noqa: E402

import fastref.rpc as rpc  # noqa: E402

__all__ = ["CLASSES"]


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("torch's own agent was made")


torch._C._distributed_rpc.TensorPipeAgent.__init__ = _refuse


class _Fixture(RpcAgentTestFixture):
    """What torch's tests ask of a backend."""

    @property
    def rpc_backend(self) -> rpc.BackendType:
        return rpc.backend_registry.BackendType["TENSORPIPE"]

    @property
    def rpc_backend_options(self) -> Any:
        return rpc.backend_registry.construct_rpc_backend_options(self.rpc_backend, init_method=self.init_method)

    def get_shutdown_error_regex(self) -> str:
        return "died|closed|shut down"

    def get_timeout_error_regex(self) -> str:
        return "RPC ran for more than"


class _Processes(MultiProcessTestCase):
    """Workers of one test, from a forkserver that has imported everything."""

    def setUp(self) -> None:
        super().setUp()
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._start_processes(context.Process)


def _made(source: type, fixture: type) -> type:
    """Return torch's class with fastref under it; children find it by its name in this module."""
    made = type(f"{source.__name__}OnFastref", (source, fixture, _Processes), {"__module__": __name__})
    globals()[made.__name__] = made
    return made


# torch's own fixture for tests of the faulty agent says which messages fail and come late.
SOURCES = {
    **dict.fromkeys((RpcTest, TensorPipeAgentRpcTest, ParameterServerTest, ReinforcementLearningRpcTest), _Fixture),
    **dict.fromkeys((DistAutogradTest, TensorPipeAgentDistAutogradTest), _Fixture),
    **dict.fromkeys((DistOptimizerTest, RemoteModuleTest, ThreeWorkersRemoteModuleTest), _Fixture),
    **dict.fromkeys((FaultyAgentRpcTest, FaultyAgentDistAutogradTest), FaultyRpcAgentTestFixture),
}
CLASSES: dict[str, type] = {source.__name__: _made(source, fixture) for source, fixture in SOURCES.items()}
