"""TLS between workers: who is let in, what the relay in front of it does, and certificates made in one call."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastref.errors import IdentityError, UsageError
from fastref.identity import (
    TlsConnection,
    client_context,
    mint,
    prove,
    relay,
    secure,
    self_made_certificates,
    server_context,
)
from fastref.options import TlsFiles
from tests.threads import Other

ROOT = Path(__file__).resolve().parent.parent
TOKEN = mint()
JOB: dict[str, Any] = {"job": "run-7", "epoch": 3, "version": "1.2.3", "timeout_s": 60.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """Certificates of the job."""
    return self_made_certificates(tmp_path_factory.mktemp("tls") / "job")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """Certificates of another job."""
    return self_made_certificates(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over loopback: the asker's end and the listener's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asker = socket.create_connection(server.getsockname())
        listener, _ = server.accept()
    with asker, listener:
        yield asker, listener


# Certificates.


def test_certificates_are_made_in_one_call_and_nobody_else_reads_the_key(tmp_path: Path) -> None:
    files = self_made_certificates(tmp_path / "new" / "tls")
    assert sorted(os.listdir(tmp_path / "new" / "tls")) == ["authority.pem", "certificate.pem", "key.pem"]
    assert stat.S_IMODE(os.stat(files.key).st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new" / "tls").stat().st_mode) == 0o700
    client_context(files), server_context(files)
    with pytest.raises(UsageError, match="is there already"):
        self_made_certificates(tmp_path / "new" / "tls")


def test_certificates_pass_the_strictest_check(files: TlsFiles, pair: tuple) -> None:
    contexts = client_context(files), server_context(files)
    for context in contexts:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    other = Other(lambda: secure(pair[0], contexts[0]).close())
    secure(pair[1], contexts[1]).close()
    assert other.outcome is None


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from fastref.identity import self_made_certificates\n"
        "self_made_certificates(sys.argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tls")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "UsageError" in run.stderr and "pip install 'fastref[tls]'" in run.stderr
    assert not (tmp_path / "tls").exists()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"certificate": "absent.pem"}, "absent.pem"),
        ({"key": "absent.pem"}, "absent.pem"),
        ({"authority": "absent.pem"}, "absent.pem"),
        ({"certificate": "key.pem"}, "key.pem"),
        ({"authority": "key.pem"}, "key.pem"),
        ({"authority": "empty.pem"}, "empty.pem"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: TlsFiles, tmp_path: Path, wrong: dict[str, str], named: str
) -> None:
    home = Path(files.key).parent
    (tmp_path / "empty.pem").touch()
    parts = {"certificate": files.certificate, "key": files.key, "authority": files.authority}
    for field, name in wrong.items():
        parts[field] = str((home if name == "key.pem" else tmp_path) / name)
    for make in (client_context, server_context):
        with pytest.raises(UsageError, match=f"TLS: cannot use .*{named}"):
            make(TlsFiles(**parts))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(files: TlsFiles, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(files.key).read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open sesame"),
        )
    )
    with pytest.raises(UsageError, match="has a passphrase"):
        client_context(TlsFiles(files.certificate, locked, files.authority))


# Who is let in.


def enter(sock: socket.socket, context: ssl.SSLContext | None, *, asks: bool) -> str:
    """Do what a worker does with a new connection; return the first bytes of the other end after that."""
    connection: TlsConnection | socket.socket = sock
    if context is not None:
        connection = secure(sock, context, timeout_s=60.0)
    try:
        prove(connection, TOKEN, asks=asks, **JOB)
    except BaseException:
        connection.close()
        raise
    with relay(connection) if isinstance(connection, TlsConnection) else connection as plain:
        plain.sendall(b"asker" if asks else b"listener")
        plain.shutdown(socket.SHUT_WR)
        said = b""
        while data := plain.recv(100):
            said += data
        return said.decode()


def without_certificate(files: TlsFiles) -> ssl.SSLContext:
    """Make a client's context that has none to show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.authority)
    return context


def older(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have a context speak TLS 1.2 alone."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def half_foreign(files: TlsFiles, foreign: TlsFiles) -> TlsFiles:
    """Certificates of the other job, by one who trusts this one."""
    return TlsFiles(foreign.certificate, foreign.key, files.authority)


CASES: dict[str, tuple[Callable, Callable, str, str]] = {
    "a plain asker": (
        lambda f, o: None,
        lambda f, o: server_context(f),
        "TLS is on there and off here|answers with TLS, which is off here|ConnectionResetError",
        "does not speak TLS",
    ),
    "a plain listener": (
        lambda f, o: client_context(f),
        lambda f, o: None,
        "ConnectionResetError",
        "begins with TLS, which is off here",
    ),
    "a listener of another authority": (
        lambda f, o: client_context(f),
        lambda f, o: server_context(half_foreign(f, o)),
        "its certificate is refused",
        "UNKNOWN_CA|DECRYPT_ERROR",
    ),
    "an asker of another authority": (
        lambda f, o: client_context(half_foreign(f, o)),
        lambda f, o: server_context(f),
        "UNKNOWN_CA|DECRYPT_ERROR",
        "its certificate is refused",
    ),
    "an asker without a certificate": (
        lambda f, o: without_certificate(f),
        lambda f, o: server_context(f),
        "it wants a certificate from here",
        "it has no certificate",
    ),
    "an asker of TLS 1.2": (
        lambda f, o: older(client_context(f)),
        lambda f, o: server_context(f),
        "another version of TLS",
        "speaks no TLS 1.3",
    ),
    "a listener of TLS 1.2": (
        lambda f, o: client_context(f),
        lambda f, o: older(server_context(f)),
        "PROTOCOL",
        "another version of TLS|PROTOCOL",
    ),
    "both right": (
        lambda f, o: client_context(f),
        lambda f, o: server_context(f),
        "^listener$",
        "^asker$",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tls_is_between_those_who_have_the_certificates_of_the_job(
    pair: tuple, files: TlsFiles, foreign: TlsFiles, case: str
) -> None:
    asks, listens, at_asker, at_listener = CASES[case]
    asker, listener = pair
    other = Other(lambda: enter(asker, asks(files, foreign), asks=True))
    try:
        here: object = enter(listener, listens(files, foreign), asks=False)
    except Exception as error:
        here = error
    listener.close()
    for outcome, expected in ((here, at_listener), (other.outcome, at_asker)):
        if case == "both right":
            assert isinstance(outcome, str), outcome
        else:
            assert isinstance(outcome, IdentityError | ConnectionError), outcome
        text = outcome if isinstance(outcome, str) else f"{type(outcome).__name__}: {outcome}"
        assert re.search(expected, text)


def test_the_certificates_alone_do_not_let_in(pair: tuple, files: TlsFiles) -> None:
    asker, listener = pair

    def ask() -> None:
        connection = secure(asker, client_context(files))
        try:
            prove(connection, mint(), asks=True, **JOB)
        finally:
            connection.close()

    other = Other(ask)
    connection = secure(listener, server_context(files))
    with pytest.raises(IdentityError, match="did not prove"):
        prove(connection, TOKEN, asks=False, **JOB)
    connection.close()
    assert isinstance(other.outcome, IdentityError)


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_stranger_who_does_not_go_on_with_tls_is_cut_at_the_deadline(
    pair: tuple, files: TlsFiles, first: bytes
) -> None:
    asker, listener = pair
    asker.sendall(first)
    with pytest.raises(TimeoutError):
        secure(listener, server_context(files), timeout_s=0.05)
    assert listener.fileno() == -1 and asker.recv(1) == b""


def test_a_stranger_who_goes_away_in_the_middle_of_tls_is_a_connection_error(pair: tuple, files: TlsFiles) -> None:
    asker, listener = pair
    asker.sendall(b"\x16\x03\x01\x02\x00\x01")
    asker.close()
    with pytest.raises(ConnectionError):
        secure(listener, server_context(files))


# The relay.


def connect_tls(pair: tuple, files: TlsFiles) -> tuple[TlsConnection, TlsConnection]:
    """Put TLS over both ends."""
    other = Other(lambda: secure(pair[0], client_context(files)))
    listener = secure(pair[1], server_context(files))
    return other.outcome, listener


@pytest.fixture
def relayed(pair: tuple, files: TlsFiles) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two plain sockets with TLS between them."""
    asker, listener = (relay(connection) for connection in connect_tls(pair, files))
    with asker, listener:
        yield asker, listener


def send_random(sock: socket.socket, size_bytes: int, seed: int) -> str:
    """Send that many bytes in pieces of all sizes, end the direction, and return a digest."""
    source, digest = random.Random(seed), hashlib.sha256()
    while size_bytes:
        piece = source.randbytes(min(size_bytes, source.choice([1, 100, 16384, 16385, 70_000, 1 << 20])))
        digest.update(piece)
        sock.sendall(piece)
        size_bytes -= len(piece)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive_to_the_end(sock: socket.socket) -> tuple[int, str]:
    """Return how many bytes came before the end, and a digest."""
    size, digest = 0, hashlib.sha256()
    while data := sock.recv(1 << 20):
        size += len(data)
        digest.update(data)
    return size, digest.hexdigest()


def test_much_goes_both_ways_at_once_and_arrives_as_it_was(relayed: tuple) -> None:
    asker, listener = relayed
    size = 48 << 20
    others = [
        Other(lambda: send_random(asker, size, 1)),
        Other(lambda: send_random(listener, size // 2, 2)),
        Other(lambda: receive_to_the_end(asker)),
    ]
    assert receive_to_the_end(listener) == (size, others[0].outcome)
    assert others[2].outcome == (size // 2, others[1].outcome)


def test_one_direction_ends_while_the_other_goes_on(relayed: tuple) -> None:
    asker, listener = relayed
    asker.sendall(b"question")
    asker.shutdown(socket.SHUT_WR)
    assert receive_to_the_end(listener)[0] == 8
    sent = Other(lambda: send_random(listener, 8 << 20, 3))
    assert receive_to_the_end(asker) == (8 << 20, sent.outcome)


def test_a_direction_ends_while_much_is_on_its_way_in_the_other(relayed: tuple) -> None:
    asker, listener = relayed
    sent = Other(lambda: send_random(listener, 8 << 20, 4))
    select.select([asker], [], [])
    asker.shutdown(socket.SHUT_WR)  # the relay of the asker holds bytes for it now
    assert listener.recv(1) == b""
    assert receive_to_the_end(asker) == (8 << 20, sent.outcome)


def test_no_more_is_taken_than_the_other_side_reads(relayed: tuple) -> None:
    asker, listener = relayed
    asker.settimeout(0.5)
    taken = 0
    with pytest.raises(TimeoutError):
        while taken < 1 << 30:
            taken += asker.send(bytes(1 << 16))
    asker.settimeout(None)
    asker.shutdown(socket.SHUT_WR)
    assert receive_to_the_end(listener)[0] == taken


def test_what_was_sent_before_closing_arrives(relayed: tuple) -> None:
    asker, listener = relayed
    asker.sendall(b"goodbye")
    asker.close()
    assert receive_to_the_end(listener)[0] == 7


def test_what_was_sent_before_closing_arrives_also_when_not_all_was_read(relayed: tuple) -> None:
    asker, listener = relayed
    listener.sendall(b"not read")
    select.select([asker], [], [])
    asker.sendall(b"goodbye")
    asker.close()
    assert receive_to_the_end(listener)[0] == 7


def test_closing_one_end_is_an_error_for_who_goes_on_sending(relayed: tuple) -> None:
    asker, listener = relayed
    asker.close()
    with pytest.raises(ConnectionError):
        while True:
            listener.sendall(bytes(1 << 16))


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_broken_connection_ends_both_directions_after_what_came_before(
    pair: tuple, files: TlsFiles, how: str
) -> None:
    asker, listener = connect_tls(pair, files)
    with relay(listener) as plain:
        asker.send(memoryview(b"before"))
        assert plain.recv(100) == b"before"
        with socket.socket(fileno=os.dup(asker.fileno())) as below:
            if how == "changed":
                below.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            else:
                below.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100) == b""
        with pytest.raises(ConnectionError):
            while True:
                plain.sendall(b"x")
    asker.close()


def test_an_idle_relay_uses_no_processor(relayed: tuple) -> None:
    asker, listener = relayed
    asker.sendall(b"awake")
    listener.recv(100)
    listener.shutdown(socket.SHUT_WR)  # half of it ended is the state in which a loop would spin
    assert asker.recv(1) == b""
    polls = []
    poll = select.poll

    def counted() -> Any:
        polls.append(1)
        return poll()

    select.poll = counted  # type: ignore[assignment, misc]
    try:
        asker.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            asker.sendall(b"one thing")
            listener.recv(100)
            listener.settimeout(0.3)
            listener.recv(1)
    finally:
        select.poll = poll  # type: ignore[misc]
    assert len(polls) < 20


def test_a_caller_who_is_gone_is_not_waited_for_longer_than_he_lingers(
    pair: tuple, files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastref.identity.pump.LINGER_S", 0.1)
    asker, listener = connect_tls(pair, files)
    plain = relay(asker)
    plain.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            select.select([], [plain], [], 0.2)
            plain.send(bytes(1 << 16))
    plain.close()  # the listener reads nothing; the leak check sees whether the thread ends
    for thread in threading.enumerate():
        if thread.name == "fastref-tls-relay":
            thread.join()
    listener.close()


def test_what_was_sent_last_gets_out_before_the_interpreter_ends(files: TlsFiles) -> None:
    program = (
        "import socket, sys\n"
        "from fastref.identity import client_context, relay, secure\n"
        "from fastref.options import TlsFiles\n"
        "sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "plain = relay(secure(sock, client_context(TlsFiles(*sys.argv[2:])), timeout_s=60))\n"
        "plain.sendall(b'x' * 100_000)\n"
        "plain.close()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(server.getsockname()[1]), files.certificate, files.key, files.authority]
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT)
        sock, _ = server.accept()
    with relay(secure(sock, server_context(files), timeout_s=60)) as plain:
        assert receive_to_the_end(plain)[0] == 100_000
    assert process.wait() == 0
