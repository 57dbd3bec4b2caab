"""Side by side: what fastref costs and gains against ``torch.distributed.rpc`` on this machine."""

from fastref.bench.compare import Comparison, compare, run_once
from fastref.bench.group import Group
from fastref.bench.rows import ROWS, Reach, Row
from fastref.bench.timing import QUICK, Effort, Summary

__all__ = ["QUICK", "ROWS", "Comparison", "Effort", "Group", "Reach", "Row", "Summary", "compare", "run_once"]
