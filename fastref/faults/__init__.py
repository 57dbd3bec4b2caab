"""A runtime whose messages fail or come late as a plan says, for tests of programs and of the protocol itself."""

from fastref.faults.plan import MESSAGES, FaultPlan
from fastref.faults.runtime import FaultyRuntime

__all__ = ["MESSAGES", "FaultPlan", "FaultyRuntime"]
