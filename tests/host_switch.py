"""What runs below a test with hosts: a switch in a network namespace, and the first process of each host.

Usage: ``python -m tests.host_switch RUN_DIRECTORY ADDRESSES SOCKET SOCKET ...``: addresses by the names of the hosts,
as JSON; the switch's socket, then one of each host. The first process of a pid namespace takes all others of it along
when it ends, those of namespaces below too. The switch's ends when the test closes its socket, in whatever way the
test process ends; with the processes go the namespaces, and with these their mounts, interfaces and addresses. No name
of any of them is ever seen outside.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tests import namespaces as ns

BRIDGE = "bridge"
CARD = "eth0"
PREFIX_BITS = 24
PATIENCE_S = 20.0

_LISTENS = "0A"  # TCP_LISTEN in net/tcp_states.h


def main() -> None:
    """Make the namespaces, be the process between the test and the switch, end with the switch."""
    run_directory, addresses = sys.argv[1], json.loads(sys.argv[2])
    sockets = [socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[3:]]
    try:
        kinds = _unshare_all()
    except OSError as error:
        _answer(sockets[0], {"impossible": str(error)})
        return
    child = os.fork()
    if child == 0:
        ns.die_with_parent()
        _run_switch(sockets, run_directory, addresses, kinds)
    for one in sockets:
        one.close()
    os.waitpid(child, 0)


def _unshare_all() -> int:
    """Enter new namespaces, as root without one of users; return the kinds that each host has of its own, and users."""
    kinds = ns.NEW_MOUNTS | ns.NEW_UTS | ns.NEW_PIDS | ns.NEW_NETWORK
    uid, gid = os.geteuid(), os.getegid()
    try:
        ns.unshare(kinds)
        return kinds
    except PermissionError:
        ns.unshare(kinds | ns.NEW_USERS)
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    # Without this an ordinary user may not map groups.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return kinds | ns.NEW_USERS


# ---- the switch


def _run_switch(sockets: list[socket.socket], run_directory: str, addresses: dict[str, str], kinds: int) -> None:
    """Be the first process of all: start the hosts, then plug and unplug their cables until the test is over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what is left to us
    own, *theirs = sockets
    try:
        ns.keep_mounts_private()
        ns.mount("proc", "/proc")
        pids = [
            _start_host(name, its, sockets, run_directory, addresses)
            for name, its in zip(addresses, theirs, strict=True)
        ]
        for one in theirs:
            one.close()
        with IPRoute() as network:
            switch = _Switch(network, pids)
            _answer(own, {"kinds": kinds})
            _serve(own, {"plug": switch.plug, "unplug": switch.unplug})
    except (OSError, NetlinkError) as error:
        _answer(own, {"impossible": str(error)})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _Switch:
    def __init__(self, network: IPRoute, pids: list[int]) -> None:
        self._network, self._pids = network, pids
        network.link("add", ifname=BRIDGE, kind="bridge")
        self._bridge = _interface(network, BRIDGE)
        network.link("set", index=self._bridge, state="up")

    def plug(self, host: int) -> None:
        if not self._network.link_lookup(ifname=f"port{host}"):
            # The same hardware address each time: the others remember it.
            card = {"ifname": CARD, "net_ns_pid": self._pids[host], "address": f"02:00:00:00:00:{host + 1:02x}"}
            self._network.link("add", ifname=f"port{host}", kind="veth", peer=card)
        port = _interface(self._network, f"port{host}")
        self._network.link("set", index=port, master=self._bridge, state="up")

    def unplug(self, host: int, remove: bool) -> None:
        port = _interface(self._network, f"port{host}")
        if remove:
            self._network.link("del", index=port)
        else:
            self._network.link("set", index=port, state="down")


def _start_host(
    name: str, own: socket.socket, sockets: list[socket.socket], run_directory: str, addresses: dict[str, str]
) -> int:
    """Start the first process of a host; return its pid here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Only a process between us and the host has a pid namespace for children that is not its own.
        ns.unshare(ns.NEW_MOUNTS | ns.NEW_UTS | ns.NEW_PIDS | ns.NEW_NETWORK)
        if first := os.fork():
            os.write(writer, str(first).encode())
            os._exit(0)
        os.close(reader)
        os.close(writer)
        for one in sockets:
            if one is not own:
                one.close()
        _run_host(name, own, run_directory, addresses)
    os.close(writer)
    with open(reader) as pipe:
        return int(pipe.read())


# ---- a host


def _run_host(name: str, own: socket.socket, run_directory: str, addresses: dict[str, str]) -> None:
    """Be the first process of a host: give it what is its own, then do what the test asks for until it is over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        _furnish(name, run_directory, addresses)
        pidfd = os.pidfd_open(os.getpid())
        with IPRoute() as network:
            network.link("set", index=_interface(network, "lo"), state="up")
            socket.send_fds(own, [b"{}"], [pidfd])
            _serve(
                own,
                {
                    "configure": lambda: _configure(network, addresses[name]),
                    "signal": _signal,
                    "listening": _listening,
                },
            )
    except (OSError, NetlinkError) as error:
        _answer(own, {"impossible": str(error)})
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _furnish(name: str, run_directory: str, addresses: dict[str, str]) -> None:
    ns.set_host_name(name)
    ns.mount("proc", "/proc")
    ns.mount("tmpfs", "/dev/shm")
    ns.mount("tmpfs", run_directory, "mode=0700")
    # Every host knows the names of all, as in a cluster; the file needs no name once it is mounted.
    names = Path("/dev/shm/hosts")
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
    names.write_text("\n".join(lines) + "\n")
    ns.bind(str(names), "/etc/hosts")
    names.unlink()


def _configure(network: IPRoute, address: str) -> None:
    """Give the network card its address, unless it has it, and wait until the cable is felt."""
    card = _interface(network, CARD)
    try:
        network.addr("add", index=card, address=address, prefixlen=PREFIX_BITS)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
    network.link("set", index=card, state="up")
    deadline = time.monotonic() + PATIENCE_S
    while network.get_links(card)[0].get("operstate") != "UP":
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"{CARD} does not come up")
        time.sleep(0.002)


def _signal(number: int) -> None:
    """Send a signal to all processes of this host but this one; of SIGSTOP wait until all have stopped."""
    with contextlib.suppress(ProcessLookupError):  # there are none
        os.kill(-1, number)
    while number == signal.SIGSTOP and set(_states()) - set("TtZX"):
        time.sleep(0.001)


def _states() -> list[str]:
    states = []
    for thread in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if thread.parent.name != str(os.getpid()):
                states.append(thread.read_text().rpartition(")")[2].split()[0])
    return states


def _listening() -> list[str]:
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_ = line.split()
            if state == _LISTENS:
                address, port = local.split(":")
                # Words of 32 bits, each in the byte order of the machine.
                words = [int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)]
                shown = socket.inet_ntop(family, b"".join(words))
                found.append(f"[{shown}]:{int(port, 16)}" if ":" in shown else f"{shown}:{int(port, 16)}")
    return sorted(found)


# ---- both


def _interface(network: IPRoute, name: str) -> int:
    for index in network.link_lookup(ifname=name):
        return index
    raise OSError(errno.ENODEV, f"there is no interface {name}")


def _serve(own: socket.socket, orders: dict[str, Any]) -> None:
    """Do what comes over the socket, one order after the other, until the test closes it."""
    while message := own.recv(65536):
        name, *arguments = json.loads(message)
        try:
            answer = {"result": orders[name](*arguments)}
        except (OSError, NetlinkError) as error:
            answer = {"impossible": f"{name}: {error}"}
        _answer(own, answer)


def _answer(own: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the test has ended
        own.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
