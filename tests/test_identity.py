"""Who gets in: where a token comes from, what its files must be like, and every way in which a proof can be wrong."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import os
import pickle
import signal
import socket
import stat
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastref
from fastref.errors import FastrefError, IdentityError, PeerError, UsageError
from fastref.identity import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    Handshake,
    Token,
    find_token,
    forget_loopback_token,
    loopback_token,
    mint,
    prove,
    refuse_without_token,
)
from fastref.identity.handshake import MAGIC, PREFIX
from fastref.options import RpcBackendOptions, TlsFiles
from fastref.rpc import TensorPipeRpcBackendOptions
from tests.threads import Other

SECRET = "correct horse battery staple"
TOKEN = Token.from_text(SECRET)
JOB: dict[str, Any] = {"job": "run-7", "epoch": 3, "version": "1.2.3"}
ENDS = pytest.mark.parametrize("asks", [True, False], ids=["asker", "listener"])


# Tokens and where they come from.


def test_nothing_of_a_token_shows() -> None:
    for shown in (repr(TOKEN), str(TOKEN), f"{TOKEN}", repr([TOKEN]), f"{TOKEN!r:>40}"):
        assert not any(part in shown for part in SECRET.split()), shown
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(TOKEN, protocol)
    assert not hasattr(TOKEN, "__dict__")
    assert copy.deepcopy([TOKEN]) == [TOKEN] == [copy.copy(TOKEN)]


def test_tokens_compare_by_their_secret() -> None:
    assert Token.from_text(f" {SECRET}\n") == TOKEN
    assert Token.from_text(SECRET + "!") != TOKEN
    assert TOKEN != SECRET
    with pytest.raises(TypeError):
        hash(TOKEN)


def test_a_minted_token_is_64_hex_digits_and_new() -> None:
    first, second = mint(), mint()
    assert first != second
    assert len(first.text()) == 64 and int(first.text(), 16)
    assert Token.from_text(first.text()) == first


@pytest.mark.parametrize("text", ["", "short", "x" * 15, "   " + "x" * 15 + "   ", "x" * 5000, "\ud800" * 20])
def test_a_token_has_a_length_that_makes_sense(text: str) -> None:
    with pytest.raises(UsageError, match="a token (has|is)") as caught:
        find_token(text, {})
    assert "secrets.token_hex" in str(caught.value)
    assert not text.strip() or text.strip() not in str(caught.value)


def write_token(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_option_comes_first_then_the_variable_then_the_file(tmp_path: Path) -> None:
    environ = {TOKEN_FILE_VARIABLE: str(write_token(tmp_path / "t", "the token of the file\n"))}
    assert find_token(None, environ) == Token(b"the token of the file")
    assert find_token(None, {**environ, TOKEN_VARIABLE: ""}) == Token(b"the token of the file")
    environ[TOKEN_VARIABLE] = "the token of the variable "
    assert find_token(None, environ) == Token(b"the token of the variable")
    assert find_token("the token of the option", environ) == Token(b"the token of the option")
    assert find_token(None, {}) is None
    assert find_token(None, {TOKEN_VARIABLE: " ", TOKEN_FILE_VARIABLE: ""}) is None


def test_the_environment_is_where_it_is_looked_for_and_no_signature_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    assert find_token(None) == TOKEN
    assert "environ(" not in str(inspect.signature(find_token))


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_private_token_file_is_read(tmp_path: Path, mode: int) -> None:
    path = write_token(tmp_path / "t", SECRET + "\n", mode)
    assert find_token(None, {TOKEN_FILE_VARIABLE: str(path)}) == TOKEN


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o602, 0o601, 0o660, 0o700, 0o777])
def test_a_token_file_that_is_open_to_others_is_refused_with_what_mends_it(tmp_path: Path, mode: int) -> None:
    path = write_token(tmp_path / "t", SECRET, mode)
    with pytest.raises(UsageError, match=f"mode {mode:04o}: chmod 600 {path}") as caught:
        find_token(None, {TOKEN_FILE_VARIABLE: str(path)})
    assert SECRET not in str(caught.value)


def test_a_token_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_token(tmp_path / "t", SECRET)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match=f"belongs to uid {os.getuid()}, not to uid {os.getuid() + 1}"):
        find_token(None, {TOKEN_FILE_VARIABLE: str(path)})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(write_token(path.with_name("real"), SECRET)), "is a symbolic link"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "is a symbolic link"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: os.mkfifo(path, 0o600), "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
        (lambda path: write_token(path, "short"), "a token has 16"),
        (lambda path: write_token(path, ""), "a token has 16"),
        (lambda path: write_token(path, "x" * 4097), "longer than 4096"),
        (lambda path: None, "cannot read .*: No such file"),
    ],
)
def test_what_is_no_private_file_is_no_token_file(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "t"
    make(path)
    with pytest.raises(UsageError, match=reason):
        find_token(None, {TOKEN_FILE_VARIABLE: str(path)})


def test_listening_without_a_token_is_refused_with_the_line_that_mends_it() -> None:
    with pytest.raises(UsageError, match=r"0\.0\.0\.0:1.*export FASTREF_TOKEN=\$\(python -c 'import secrets;"):
        refuse_without_token("0.0.0.0:1")


@pytest.mark.parametrize("kind", [RpcBackendOptions, TensorPipeRpcBackendOptions])
def test_options_take_a_token_and_do_not_show_it(kind: type[RpcBackendOptions]) -> None:
    files = TlsFiles("a.pem", Path("b.pem"), "c.pem")
    options = kind(token=SECRET, tls=files)
    assert (options.token, options.tls, files.key) == (SECRET, files, "b.pem")
    assert (kind().token, kind().tls) == (None, None)
    for shown in (repr(options), str(options)):
        assert not any(part in shown for part in SECRET.split())
        assert "token='...'" in shown and "b.pem" in shown
    assert "token=None" in repr(kind())
    with pytest.raises(TypeError, match="token is a string, got a bytes") as caught:
        kind(token=SECRET.encode())
    assert SECRET not in str(caught.value)
    with pytest.raises(TypeError, match="tls is a TlsFiles"):
        kind(tls="a.pem")


def write_environment(rank: int, directory: str) -> None:
    seen = {name: os.environ.get(name) for name in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE)}
    (Path(directory) / str(rank)).write_text(json.dumps(seen))


@pytest.mark.parametrize("given", [{}, {TOKEN_VARIABLE: SECRET}, {TOKEN_FILE_VARIABLE: "/a/file"}])
def test_a_group_that_is_spawned_has_a_token_of_its_own_unless_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mp_context: object, given: dict[str, str]
) -> None:
    for name in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []
    for group in ("one", "other"):
        (tmp_path / group).mkdir()
        fastref.spawn(write_environment, 2, (str(tmp_path / group),), start_method="forkserver")
        first, second = (json.loads((tmp_path / group / str(rank)).read_text()) for rank in range(2))
        assert first == second
        seen.append(first)
    absent = dict.fromkeys((TOKEN_VARIABLE, TOKEN_FILE_VARIABLE))
    if given:
        assert seen == [{**absent, **given}] * 2
    else:
        assert [len(find_token(None, one).text()) for one in seen] == [64, 64]  # type: ignore[union-attr]
        assert seen[0] != seen[1]
        assert TOKEN_VARIABLE not in os.environ


# The token that workers of one host share by themselves.


def test_the_loopback_token_is_made_once_and_private(tmp_path: Path) -> None:
    token = loopback_token(tmp_path)
    assert loopback_token(tmp_path) == token
    assert os.listdir(tmp_path) == ["token"]
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert len(token.text()) == 64


def test_all_who_come_at_once_share_one_loopback_token(tmp_path: Path) -> None:
    for turn in range(20):
        directory = tmp_path / str(turn)
        directory.mkdir()
        found: list[str] = []
        start = threading.Barrier(8)

        def come(directory: Path = directory, found: list[str] = found, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(loopback_token(directory).text())

        threads = [threading.Thread(target=come) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(found)) == 1
        assert os.listdir(directory) == ["token"]


def write_loopback_token(directory: str) -> None:
    (Path(directory) / f"mine-{os.getpid()}").write_text(loopback_token(Path(directory)).text())


def test_processes_that_come_at_once_share_one_loopback_token(tmp_path: Path, spawn_workers: Callable) -> None:
    spawn_workers(write_loopback_token, [(str(tmp_path),)] * 6).join()
    found = [path.read_text() for path in tmp_path.glob("mine-*")]
    assert len(found) == 6 and set(found) == {(tmp_path / "token").read_text()}


def test_who_comes_second_between_two_steps_takes_the_token_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_late(source: Path, target: Path, **how: bool) -> None:
        write_token(tmp_path / "token", SECRET)
        link(source, target, **how)

    monkeypatch.setattr(os, "link", link_late)
    assert loopback_token(tmp_path) == TOKEN
    assert os.listdir(tmp_path) == ["token"]


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_loopback_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    write_token(tmp_path / "token", SECRET, mode)
    with pytest.raises(UsageError, match="chmod 600"):
        loopback_token(tmp_path)


def test_a_loopback_token_that_is_a_link_is_refused_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="symbolic link"):
        loopback_token(tmp_path)
    assert os.listdir(tmp_path) == ["token"]


def test_the_last_one_takes_the_loopback_token_away(tmp_path: Path) -> None:
    loopback_token(tmp_path)
    (tmp_path / "token.0123456789abcdef.new").touch()  # of one who was killed between two steps
    somebody = tmp_path / "0123456789abcdef.member"
    somebody.touch()
    assert not forget_loopback_token(tmp_path)
    somebody.unlink()
    assert forget_loopback_token(tmp_path)
    assert os.listdir(tmp_path) == []
    assert forget_loopback_token(tmp_path)
    assert forget_loopback_token(tmp_path / "absent")


# The handshake.


def handshake(asks: bool, token: Token = TOKEN, **changed: Any) -> Handshake:
    return Handshake(token, asks=asks, **{**JOB, **changed})


def deliver(receiver: Handshake, data: bytes) -> None:
    """Feed ``data`` as the receiver wants it; what is left over when it wants nothing must be nothing."""
    while data:
        assert receiver.wants, f"{len(data)} bytes more than are wanted"
        piece, data = data[: receiver.wants], data[receiver.wants :]
        receiver.feed(piece)


def converse(asker: Handshake, listener: Handshake) -> list[bytes]:
    """Carry messages both ways until nobody has any; return them in order."""
    said = []
    for sender, receiver in itertools.cycle([(asker, listener), (listener, asker)]):
        data = sender.to_send()
        if not data:
            return said
        said.append(data)
        deliver(receiver, data)
    raise AssertionError


def test_two_workers_of_a_job_prove_themselves_to_each_other() -> None:
    asker, listener = handshake(True), handshake(False)
    assert [len(message) for message in converse(asker, listener)] == [72, 72, 40, 40]
    assert asker.done and listener.done
    assert asker.wants == listener.wants == 0


def test_the_listener_is_done_only_when_its_proof_is_out() -> None:
    asker, listener = handshake(True), handshake(False)
    for sender, receiver in [(asker, listener), (listener, asker), (asker, listener)]:
        deliver(receiver, sender.to_send())
    assert not listener.done and not listener.wants
    proof = listener.to_send()
    assert listener.done and not asker.done
    deliver(asker, proof)
    assert asker.done


def test_the_listener_says_nothing_before_a_whole_hello_has_come() -> None:
    asker, listener = handshake(True), handshake(False)
    hello = asker.to_send()
    assert listener.to_send() == b""
    listener.feed(hello[:8])
    assert listener.to_send() == b"" and listener.wants == 64
    listener.feed(hello[8:])
    assert len(listener.to_send()) == 72


def test_the_listener_makes_nothing_with_the_token_before_the_asker_has_proved_himself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asker, listener = handshake(True), handshake(False)
    made: list[tuple[bytes, ...]] = []
    authenticate = Token.authenticate
    monkeypatch.setattr(Token, "authenticate", lambda token, *parts: made.append(parts) or authenticate(token, *parts))
    deliver(listener, asker.to_send())
    assert listener.to_send() and not made
    with pytest.raises(IdentityError):
        deliver(listener, PREFIX.pack(MAGIC, 1, 3, 40) + bytes(32))
    assert len(made) == 1 and listener.to_send() == b""


@pytest.mark.parametrize("message", range(4))
def test_no_bit_of_a_message_may_change(message: int) -> None:
    sizes = [72, 72, 40, 40]
    for bit in range(sizes[message] * 8):
        asker, listener = handshake(True), handshake(False)
        with pytest.raises(IdentityError):
            for number, (sender, receiver) in enumerate(itertools.cycle([(asker, listener), (listener, asker)])):
                data = bytearray(sender.to_send())
                assert number < 4, f"bit {bit} changed nothing"
                if number == message:
                    data[bit // 8] ^= 1 << bit % 8
                deliver(receiver, bytes(data))
        # Whoever the change was for does not let the other in. The listener lets an asker in whom it
        # cannot tell any more: its own last message is not answered.
        assert not asker.done
        assert not listener.done or message == 3


@pytest.mark.parametrize(
    ("token", "changed"),
    [
        (Token.from_text(SECRET + "."), {}),
        (mint(), {}),
        (TOKEN, {"job": "run-8"}),
        (TOKEN, {"job": "run-7\0"}),
        (TOKEN, {"job": ""}),
        (TOKEN, {"epoch": 2}),
        (TOKEN, {"epoch": 3 << 8}),
        (TOKEN, {"job": "", "epoch": 0}),
    ],
)
@ENDS
def test_a_wrong_token_job_or_epoch_is_refused_and_all_look_the_same(
    asks: bool, token: Token, changed: dict[str, Any]
) -> None:
    stranger, worker = handshake(asks, token, **changed), handshake(not asks)
    asker, listener = (stranger, worker) if asks else (worker, stranger)
    said = []
    with pytest.raises(IdentityError, match="its token, job name or restart count differs") as caught:
        for sender, receiver in itertools.cycle([(asker, listener), (listener, asker)]):
            said.append(sender.to_send())
            deliver(receiver, said[-1])
    # The listener refuses, in silence, whoever of the two is wrong.
    assert [len(message) for message in said] == [72, 72, 40]
    assert listener.to_send() == b""
    assert not asker.done and not listener.done
    assert caught.value.their_version == ""


def test_a_listener_that_cannot_prove_itself_is_refused() -> None:
    asker, listener = handshake(True), handshake(False)
    deliver(listener, asker.to_send())
    deliver(asker, listener.to_send())
    proof = asker.to_send()
    for forged in (bytes(32), proof[8:], mint().authenticate(proof)):
        attacked = copy.copy(asker)
        with pytest.raises(IdentityError, match="did not prove"):
            deliver(attacked, PREFIX.pack(MAGIC, 1, 4, 40) + forged)
        assert not attacked.done


@pytest.mark.parametrize("theirs", ["1.2.4", "1.2.30", "1.2", "x" * 32])
def test_another_version_is_named_on_both_sides(theirs: str) -> None:
    asker, listener = handshake(True), handshake(False, version=theirs)
    with pytest.raises(IdentityError, match=f"runs version {JOB['version']}, this one {theirs}: ") as caught:
        deliver(listener, asker.to_send())
    assert caught.value.their_version == JOB["version"]
    with pytest.raises(IdentityError, match=f"runs version {theirs}, this one {JOB['version']}: ") as caught:
        deliver(asker, listener.to_send())
    assert caught.value.their_version == theirs
    assert asker.to_send() == listener.to_send() == b""
    assert not asker.met and not listener.met


def test_a_version_that_is_no_text_is_shown_harmlessly() -> None:
    listener = handshake(False)
    with pytest.raises(IdentityError, match="runs version ") as caught:
        deliver(listener, PREFIX.pack(MAGIC, 1, 1, 72) + bytes(32) + b"\x1b[2J\n\xff".ljust(32, b"\0"))
    assert str(caught.value).isprintable() and caught.value.their_version.isprintable()


def test_another_layout_is_named() -> None:
    listener = handshake(False)
    with pytest.raises(IdentityError, match=r"layout 2 .* layout 1 \(fastref 1.2.3\)"):
        listener.feed(PREFIX.pack(MAGIC, 2, 1, 72))
    assert listener.wants == 0 and listener.to_send() == b""


@pytest.mark.parametrize(("asks", "both"), [(True, "both ends of the connection ask"), (False, "both .* listen")])
def test_two_of_the_same_role_refuse_each_other(asks: bool, both: str) -> None:
    one, other = handshake(asks), handshake(asks)
    hello = one.to_send() or PREFIX.pack(MAGIC, 1, 2, 72) + bytes(64)
    with pytest.raises(IdentityError, match=both):
        deliver(other, hello)


def test_our_own_messages_are_no_answer() -> None:
    for kind_too in (False, True):  # as they are, or made to look like the listener's
        asker = handshake(True)
        hello = bytearray(asker.to_send())
        hello[5] += kind_too
        if not kind_too:
            with pytest.raises(IdentityError, match="both ends of the connection ask"):
                deliver(asker, bytes(hello))
            continue
        deliver(asker, bytes(hello))
        proof = bytearray(asker.to_send())
        proof[5] += 1
        with pytest.raises(IdentityError, match="did not prove"):
            deliver(asker, bytes(proof))


def test_a_worker_that_asks_and_listens_gives_no_proof_that_serves_the_other_way() -> None:
    # The attacker connects to the worker who connects to him, and hands each conversation's messages to the other.
    asker, listener = handshake(True), handshake(False)
    deliver(listener, asker.to_send())
    hello = listener.to_send()
    second = handshake(True)
    deliver(second, hello)
    second_proof, listener_kind = bytearray(second.to_send()), 4
    deliver(asker, hello)
    asker.to_send()
    second_proof[5] = listener_kind
    with pytest.raises(IdentityError, match="did not prove"):
        deliver(asker, bytes(second_proof))


def test_a_recorded_conversation_opens_nothing() -> None:
    asker, listener = handshake(True), handshake(False)
    recorded = converse(asker, listener)
    again = handshake(False)
    deliver(again, recorded[0])
    assert again.to_send() != recorded[1]
    with pytest.raises(IdentityError, match="did not prove"):
        deliver(again, recorded[2])
    again = handshake(True)
    again.to_send()
    deliver(again, recorded[1])
    assert again.to_send() != recorded[2]
    with pytest.raises(IdentityError, match="did not prove"):
        deliver(again, recorded[3])


PROBES = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP answer": b"HTTP/1.1 400 Bad Request\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "TLS alert": b"\x15\x03\x03\x00\x02\x02\x28\x00",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(16),
    "ones": b"\xff" * 16,
    "RPC bind": b"\x80\x00\x00\x28\x72\xfe\x1d\x13",
    "pickle": pickle.dumps({"a": 1}, 5),
    "a size of 64 KiB": PREFIX.pack(MAGIC, 1, 1, 0xFFFF),
    "a size of 0": PREFIX.pack(MAGIC, 1, 1, 0),
    "a size that is one too many": PREFIX.pack(MAGIC, 1, 1, 73),
    "a proof without a hello": PREFIX.pack(MAGIC, 1, 3, 40),
    "a kind that does not exist": PREFIX.pack(MAGIC, 1, 9, 72),
}


@pytest.mark.parametrize("probe", PROBES)
@ENDS
def test_a_probe_is_refused_after_8_bytes(asks: bool, probe: str) -> None:
    worker = handshake(asks)
    worker.to_send()
    assert worker.wants == 8
    with pytest.raises(IdentityError) as caught:
        worker.feed(PROBES[probe][:8])
    assert worker.wants == 0 and worker.to_send() == b"" and not worker.done
    assert str(caught.value).isprintable()
    if probe.startswith(("HTTP", "TLS", "SSH")):
        assert probe.split()[0] in str(caught.value)
    with pytest.raises(UsageError):
        worker.feed(PROBES[probe][:8])


@given(st.binary(min_size=8, max_size=300), st.booleans())
def test_arbitrary_bytes_do_not_get_in(data: bytes, asks: bool) -> None:
    worker = handshake(asks)
    worker.to_send()
    with contextlib.suppress(IdentityError):
        while worker.wants and len(data) >= worker.wants:
            assert worker.wants <= 64
            piece, data = data[: worker.wants], data[worker.wants :]
            worker.feed(piece)
    assert not worker.done


@given(st.lists(st.binary(min_size=64, max_size=64), min_size=1, max_size=3), st.booleans())
def test_arbitrary_bodies_do_not_get_in(bodies: list[bytes], asks: bool) -> None:
    worker = handshake(asks)
    for kind, body in zip((2, 4) if asks else (1, 3), bodies, strict=False):
        size = 72 if kind < 3 else 40
        message = PREFIX.pack(MAGIC, 1, kind, size) + (body[:32] + b"1.2.3".ljust(32, b"\0") if kind < 3 else body[:32])
        worker.to_send()
        with contextlib.suppress(IdentityError):
            deliver(worker, message)
    assert not worker.done


@given(st.text(max_size=50), st.integers(0, (1 << 64) - 1), st.binary(min_size=16, max_size=200))
def test_any_job_and_token_work(job: str, epoch: int, secret: bytes) -> None:
    asker = handshake(True, Token(secret), job=job, epoch=epoch)
    listener = handshake(False, Token(secret), job=job, epoch=epoch)
    converse(asker, listener)
    assert asker.done and listener.done


@pytest.mark.parametrize("changed", [{"epoch": -1}, {"epoch": 1 << 64}, {"version": ""}, {"version": "x" * 33}])
def test_what_does_not_fit_into_a_message_is_refused_here(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        handshake(True, **changed)


def test_an_identity_error_is_in_its_place_and_travels() -> None:
    error = pickle.loads(pickle.dumps(IdentityError("no", "alice", their_version="0.9")))
    assert isinstance(error, PeerError) and isinstance(error, FastrefError)
    assert (str(error), error.worker, error.their_version) == ("no", "alice", "0.9")


# Over sockets.


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        asker = socket.create_connection(server.getsockname())
        return asker, server.accept()[0]


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets: the asker's and the listener's."""
    asker, listener = socket.socketpair() if request.param == "unix" else tcp_pair()
    with asker, listener:
        yield asker, listener


def prove_as(sock: socket.socket, asks: bool, token: Token = TOKEN, timeout_s: float = 60.0, **changed: Any) -> None:
    prove(sock, token, asks=asks, timeout_s=timeout_s, **{**JOB, **changed})


@pytest.mark.parametrize("timeout_s", [None, 0, 7.5])
def test_both_ends_prove_themselves_and_the_socket_stays_as_it_was(pair: tuple, timeout_s: float | None) -> None:
    asker, listener = pair
    asker.settimeout(timeout_s)
    listener.settimeout(timeout_s)
    other = Other(lambda: (prove_as(asker, True), asker.send(b"first")))
    prove_as(listener, False)
    assert other.outcome == (None, 5)
    assert asker.gettimeout() == listener.gettimeout() == timeout_s
    listener.settimeout(None)
    assert listener.recv(100) == b"first"  # nothing of it was taken by the handshake


@pytest.mark.parametrize("changed", [{"token": mint()}, {"job": "other"}, {"epoch": 4}])
@ENDS
def test_the_wrong_one_learns_only_that_the_connection_was_closed(
    pair: tuple, asks: bool, changed: dict[str, Any]
) -> None:
    asker, listener = pair

    def ask() -> None:
        prove_as(asker, True, **(changed if asks else {}))

    other = Other(ask)
    with pytest.raises(IdentityError, match="did not prove"):
        prove_as(listener, False, **({} if asks else changed))
    listener.close()
    assert isinstance(other.outcome, IdentityError)
    assert "closed the connection when this one had proved itself" in str(other.outcome)


def test_mixed_versions_are_named_to_both_workers(pair: tuple) -> None:
    asker, listener = pair
    other = Other(lambda: prove_as(asker, True, version="2"))
    with pytest.raises(IdentityError, match="runs version 2, this one 1.2.3"):
        prove_as(listener, False)
    listener.close()
    assert "runs version 1.2.3, this one 2" in str(other.outcome)


def test_bytes_that_come_one_at_a_time_do(pair: tuple) -> None:
    asker, listener = pair
    other = Other(lambda: prove_as(listener, False))
    mine = handshake(True)
    while not mine.done:
        for byte in mine.to_send():
            asker.sendall(bytes([byte]))
        if mine.wants:
            mine.feed(b"".join(asker.recv(1) for _ in range(mine.wants)))
    assert other.outcome is None


@pytest.mark.parametrize("end", range(0, 112, 8))
def test_a_connection_that_ends_early_is_an_error_at_once(pair: tuple, end: int) -> None:
    asker, listener = pair
    other = Other(lambda: prove_as(listener, False))
    mine = handshake(True)
    hello = mine.to_send()
    asker.sendall(hello[:end])
    if end > 72:
        deliver(mine, b"".join(asker.recv(1) for _ in range(72)))
        asker.sendall(mine.to_send()[: end - 72])
    asker.shutdown(socket.SHUT_WR)
    assert isinstance(other.outcome, ConnectionError)


@pytest.mark.parametrize(
    "first", [b"", b"\xf5", PREFIX.pack(MAGIC, 1, 1, 72), PREFIX.pack(MAGIC, 1, 1, 72) + b"x" * 63]
)
def test_a_stranger_who_says_too_little_is_cut_at_the_deadline(pair: tuple, first: bytes) -> None:
    asker, listener = pair
    asker.sendall(first)
    with pytest.raises(TimeoutError):
        prove_as(listener, False, timeout_s=0.05)
    assert listener.gettimeout() is None


def test_a_stranger_who_sends_a_byte_at_a_time_is_cut_at_the_same_deadline(pair: tuple) -> None:
    asker, listener = pair
    hello = handshake(True).to_send()
    ended = threading.Event()

    def drip() -> None:
        for byte in hello[:-1]:
            asker.sendall(bytes([byte]))
            if ended.wait(0.01):
                return

    other = Other(drip)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        prove_as(listener, False, timeout_s=0.1)
    assert time.monotonic() - began >= 0.1
    ended.set()
    assert other.outcome is None


def test_a_deadline_that_is_over_is_over(pair: tuple) -> None:
    asker, listener = pair
    asker.sendall(handshake(True).to_send())
    with pytest.raises(TimeoutError):
        prove_as(listener, False, timeout_s=-1.0)


def test_a_stranger_who_does_not_read_is_cut_at_the_deadline(pair: tuple) -> None:
    asker, listener = pair
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.send(bytes(65536))
    with contextlib.suppress(BlockingIOError):
        while True:  # the last bytes of room too
            listener.send(b"x")
    asker.sendall(handshake(True).to_send())
    with pytest.raises(TimeoutError):
        prove_as(listener, False, timeout_s=0.05)


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_gets_no_answer(pair: tuple, probe: str) -> None:
    asker, listener = pair
    asker.sendall(PROBES[probe])
    with pytest.raises(IdentityError):
        prove_as(listener, False)
    listener.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        assert asker.recv(1) == b""


@pytest.mark.parametrize("probe", [*PROBES, "a hello and a wrong proof"])
def test_a_probe_that_never_ends_has_no_memory_allocated(pair: tuple, probe: str) -> None:
    asker, listener = pair
    asker.setblocking(False)
    first = PROBES.get(probe) or handshake(True).to_send() + PREFIX.pack(MAGIC, 1, 3, 40)
    assert asker.send(first + bytes(4 << 20)) > 1000
    tracemalloc.start()
    try:
        with pytest.raises(IdentityError):
            prove_as(listener, False)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


def test_one_who_ends_after_fewer_bytes_that_no_worker_sends_is_named(pair: tuple) -> None:
    asker, listener = pair
    asker.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert has 7 bytes
    asker.shutdown(socket.SHUT_WR)
    with pytest.raises(IdentityError, match="answers with TLS, which is off here"):
        prove_as(listener, False)


def test_a_peer_that_resets_is_a_connection_error() -> None:
    asker, listener = tcp_pair()
    with asker, listener:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asker.close()
        with pytest.raises(ConnectionError):
            prove_as(listener, False)


def test_signals_do_not_disturb_the_proof(pair: tuple) -> None:
    asker, listener = pair
    came = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: came.set())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        other = Other(lambda: (came.wait(), prove_as(asker, True)))
        prove_as(listener, False)  # waits while the signals come
        assert other.outcome == (True, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
