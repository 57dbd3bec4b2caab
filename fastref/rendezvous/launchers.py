"""What a launcher's environment says of a job: torchrun's variables, or Slurm's where nobody has set those."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from fastref.errors import UsageError

__all__ = ["all_on_this_host", "launch_settings", "node_rank", "restart_count", "run_id", "start_of_all"]

_NEEDED = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
_REPLACED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
# Below the ports that Linux gives out by itself (32768 on).
_FIRST_PORT, _PORTS = 20000, 12000


def launch_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, "" for what is not known.

    As they are set, or, when none of the first three is, as Slurm's variables of the job step say: the first host of
    the list of nodes is the master, which is where Slurm puts task 0 unless it is told otherwise, and the port comes
    from the numbers of job and step, unless ``MASTER_PORT`` is set.

    Raises
    ------
    UsageError
        A number of Slurm's is none.
    """
    settings = {name: environ.get(name, "") for name in (*_REPLACED, "MASTER_PORT")}
    if uses_slurm(environ):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        settings["RANK"], settings["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_NTASKS"]
        settings["MASTER_ADDR"] = first_node(nodes)
        settings["MASTER_PORT"] = settings["MASTER_PORT"] or str(_port(environ))
    return settings


def uses_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether Slurm started this process and nobody has said otherwise."""
    return all(environ.get(name) for name in _NEEDED) and not any(environ.get(name) for name in _REPLACED)


def first_node(nodes: str) -> str:
    """Return the first host of a list of Slurm's: ``a[03-05,9]x,b`` begins with ``a03x``."""
    # A comma within brackets belongs to the first name.
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    if match is None:
        raise UsageError(f"Slurm's list of nodes begins with no name: {nodes!r}")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0])


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often torchrun has restarted the workers of this node after a failure there, 0 without it.

    Each node counts for itself: where one has failed and another has not, they go on together with different counts.

    Raises
    ------
    UsageError
        ``TORCHELASTIC_RESTART_COUNT`` is no number.
    """
    return _number("TORCHELASTIC_RESTART_COUNT", environ.get("TORCHELASTIC_RESTART_COUNT") or "0")


def node_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return torchrun's number for the node, of which there may be several on one host; 0 without it.

    Raises
    ------
    UsageError
        ``GROUP_RANK`` is no number.
    """
    return _number("GROUP_RANK", environ.get("GROUP_RANK") or "0") if run_id(environ) else 0


def start_of_all(environ: Mapping[str, str] = os.environ) -> int:
    """Return the restart count if all workers are known to have the same, because they are of one node, else 0.

    Raises
    ------
    UsageError
        As ``restart_count``.
    """
    return restart_count(environ) if all_on_this_host(environ) or not run_id(environ) else 0


def run_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return torchrun's name for the job, "" without it."""
    return environ.get("TORCHELASTIC_RUN_ID", "")


def all_on_this_host(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher says that no worker is on another host."""
    if uses_slurm(environ):
        return (environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES")) == "1"
    return bool(environ.get("WORLD_SIZE")) and environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")


def _port(environ: Mapping[str, str]) -> int:
    job = _number("SLURM_JOB_ID", environ.get("SLURM_JOB_ID") or "0")
    step = _number("SLURM_STEP_ID", environ.get("SLURM_STEP_ID") or "0")
    return _FIRST_PORT + (job + 101 * step) % _PORTS


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{name} must be a number, it is {text!r}")
    return int(text)
