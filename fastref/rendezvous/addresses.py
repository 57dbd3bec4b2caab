"""Which address of this host the workers of other hosts are told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastref.errors import UsageError

__all__ = ["ADDRESS_VARIABLE", "INTERFACE_VARIABLE", "LOOPBACK", "Address", "choose_address", "leaves_host"]

ADDRESS_VARIABLE, INTERFACE_VARIABLE = "FASTREF_ADDRESS", "FASTREF_INTERFACE"
TORCHS_VARIABLE = "TP_SOCKET_IFNAME"  # by which torch's own agent goes
_SIOCGIFADDR, _SIOCGIFFLAGS = 0x8915, 0x8913  # <linux/sockios.h>
_IFF_UP = 1  # <net/if.h>
_IFREQ = struct.Struct("16s24x")
# Connecting a socket for datagrams sends nothing; it only asks the system which way it would send them.
_ANY_PORT = 9
# Reserved for documentation (RFC 5737, RFC 3849), so on no network of this host: the way there is the default route.
_FAR_AWAY = ("192.0.2.1", "2001:db8::1")


@dataclass(frozen=True)
class Address:
    """An address of this host.

    Parameters
    ----------
    text : str
        IPv4 or IPv6.
    why : str
        Why this one, in a few words.
    """

    text: str
    why: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.text).is_loopback


def leaves_host(connection: socket.socket) -> bool:
    """Tell whether what is sent over a connection goes through a network as it is.

    It does not over a pair of unix sockets, behind which TLS is, nor between two addresses of one host.
    """
    if connection.family == socket.AF_UNIX:
        return False
    try:
        here, there = (ipaddress.ip_address(name[0]) for name in (connection.getsockname(), connection.getpeername()))
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False  # it is over already, as who reads it will find
    return here != there and not there.is_loopback


LOOPBACK = Address("127.0.0.1", "all workers are on this host")


def choose_address(
    store_host: str | None, option: str | None = None, environ: Mapping[str, str] = os.environ
) -> Address:
    """Return the address of this host to listen at.

    The first of these: ``option``; ``FASTREF_ADDRESS``; the address of the interface that ``FASTREF_INTERFACE`` or
    ``TP_SOCKET_IFNAME`` names; the one from which the store is reached; the one of the default route; the first that is
    not loopback; loopback.

    Parameters
    ----------
    store_host : str or None
        Where the store of the job listens, None where that is not known.
    option : str or None
        An address or a name of this host, or of one of its interfaces.
    environ : mapping
        The environment.

    Raises
    ------
    UsageError
        What was asked for is no address of this host.
    """
    if option in _interfaces():
        return _of_interface(option, "the option address")
    if option:
        return _named(option, "the option address")
    if given := environ.get(ADDRESS_VARIABLE):
        return _named(given, ADDRESS_VARIABLE)
    for variable in (INTERFACE_VARIABLE, TORCHS_VARIABLE):
        if interface := environ.get(variable):
            return _of_interface(interface, variable)
    if store_host:
        for target in _addresses_of(store_host):
            source = _source_towards(target)
            # A name that this host alone takes for itself (127.0.1.1 in /etc/hosts) is not meant so by the others.
            if source and (not ipaddress.ip_address(source).is_loopback or _means_loopback(store_host)):
                return Address(source, f"it reaches the store at {store_host}")
    for target in _FAR_AWAY:
        if source := _source_towards(target):
            return Address(source, "it is that of the default route")
    for interface in filter(_is_up, _interfaces()):
        with contextlib.suppress(UsageError):
            address = _of_interface(interface, "an interface")
            if not address.is_loopback:
                return Address(address.text, f"it is that of {interface}, and there is no default route")
    return Address(LOOPBACK.text, "this host has no other")


def _named(name: str, where: str) -> Address:
    for address in _addresses_of(name):
        with contextlib.suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return Address(address, where)
    raise UsageError(
        f"{where} must be an address of this host, {name!r} is none; its interfaces are {', '.join(_interfaces())}"
    )


def _addresses_of(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(target[0]) for *_, target in found))


def _source_towards(target: str) -> str | None:
    try:
        with socket.socket(_family(target), socket.SOCK_DGRAM) as probe:
            probe.connect((target, _ANY_PORT))
            return str(probe.getsockname()[0])
    except OSError:  # no way there
        return None


def _means_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") in ("localhost", "ip6-localhost", "ip6-loopback")


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _is_up(name: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, _IFREQ.pack(os.fsencode(name)))
        return bool(int.from_bytes(answer[16:18], sys.byteorder) & _IFF_UP)
    return False


def _of_interface(name: str, where: str) -> Address:
    if name not in _interfaces():
        has = ", ".join(_interfaces())
        raise UsageError(f"{where}={name}: this host has no such interface, it has {has}")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, _IFREQ.pack(os.fsencode(name)))
        return Address(socket.inet_ntop(socket.AF_INET, answer[20:24]), f"{where}={name}")
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        digits, *_, owner = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(digits))
        if owner == name and not address.is_link_local:
            return Address(str(address), f"{where}={name}")
    raise UsageError(f"{where}={name}: that interface has no address that others can use")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # no IPv6 here
        return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
