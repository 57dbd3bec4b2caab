"""Two hosts on one machine: network namespaces, with a pair of virtual network cards (veth) between them.

By the tools of util-linux and iproute2, so that nothing is asked of the process that measures.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from fastref.errors import FastrefError

__all__ = ["ADDRESSES", "Hosts", "two_hosts", "why_not_two_hosts"]

ADDRESSES = ("10.78.0.1", "10.78.0.2")
_CARD = "card"
_TOOLS = ("ip", "nsenter", "unshare")
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Hosts:
    """Where workers run.

    Parameters
    ----------
    commands : pair of sequences of str
        What has a program run on the first host, and on the second, ahead of its own command.
    environment : mapping
        For the workers.
    """

    commands: tuple[Sequence[str], Sequence[str]] = ((), ())
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Have two hosts with ``ADDRESSES`` while the context lasts.

    Raises
    ------
    FastrefError
        The system does not let this user make them.
    """
    with ExitStack() as stack:
        users = ["--user", "--preserve-credentials"] if os.geteuid() else []
        first = _hold(stack, _unshare())
        into_first = ["nsenter", "--target", str(first), *users]
        second = _hold(stack, [*into_first, "unshare", "--net"])
        commands = [*into_first, "--net"], ["nsenter", "--target", str(second), *users, "--net"]
        _run([*commands[0], "ip", "link", "add", _CARD, "type", "veth", "peer", "name", _CARD, "netns", str(second)])
        for command, address in zip(commands, ADDRESSES, strict=True):
            _run([*command, "ip", "address", "add", f"{address}/24", "dev", _CARD])
            for card in ("lo", _CARD):
                _run([*command, "ip", "link", "set", card, "up"])
        torchs = {"TP_SOCKET_IFNAME": _CARD, "GLOO_SOCKET_IFNAME": _CARD}
        yield Hosts(commands, {"FASTREF_TOKEN": secrets.token_hex(32), **torchs})


def why_not_two_hosts() -> str | None:
    """Say in a sentence why there can be no two hosts here, None when there can."""
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(lacking)} here"
    try:
        _run([*_unshare(), "true"])
    except FastrefError as error:
        return str(error)
    return None


def _unshare() -> list[str]:
    # An ordinary user may make network namespaces in a user namespace of his own.
    return ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--net"]


def _hold(stack: ExitStack, command: Sequence[str]) -> int:
    """Start a process whose namespaces last as long as the context, or this process; return its pid."""
    # None of the commands forks: the pid stays the same.
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    stack.enter_context(process)  # closes its pipes, at which it ends, and waits for it
    assert process.stdout is not None
    if not process.stdout.readline():
        raise FastrefError(f"{' '.join(command)} has failed")
    return process.pid


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    if done.returncode:
        raise FastrefError(f"{' '.join(command)} has failed: {done.stderr.strip()}")
