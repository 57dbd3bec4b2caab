"""The mutual proof that both ends of a connection have the token of one job, without any I/O."""

from __future__ import annotations

import hmac
import secrets
import struct

from fastref.errors import IdentityError, UsageError
from fastref.identity.token import Token

__all__ = ["Handshake"]

MAGIC = b"\xf5frh"  # no text begins so, and no TLS record
LAYOUT = 1
PREFIX = struct.Struct(">4sBBH")  # magic, layout, kind, size of the message with this prefix in bytes
NONCE_BYTES = 32
VERSION_BYTES = 32
PROOF_BYTES = 32

ASKER_HELLO, LISTENER_HELLO, ASKER_PROOF, LISTENER_PROOF = 1, 2, 3, 4
HELLO_SIZE = PREFIX.size + NONCE_BYTES + VERSION_BYTES
PROOF_SIZE = PREFIX.size + PROOF_BYTES
_SIZE_OF = {ASKER_HELLO: HELLO_SIZE, LISTENER_HELLO: HELLO_SIZE, ASKER_PROOF: PROOF_SIZE, LISTENER_PROOF: PROOF_SIZE}

_ASKER_LABEL = b"fastref handshake 1, the asker proves\0"
_LISTENER_LABEL = b"fastref handshake 1, the listener proves\0"
_MAX_EPOCH = (1 << 64) - 1

_HINTS = (
    (b"\x16\x03", "it begins with TLS, which is off here"),
    (b"\x15\x03", "it answers with TLS, which is off here"),
    (b"HTTP/", "it speaks HTTP"),
    (b"GET ", "it speaks HTTP"),
    (b"POST ", "it speaks HTTP"),
    (b"PRI * HT", "it speaks HTTP"),
    (b"SSH-", "it speaks SSH"),
)


class Handshake:
    """One end of the mutual proof: bytes in, bytes out.

    Rule 1: no I/O, no clock, no thread; one caller at a time, one object for each connection.
    Rule 2: the first 8 bytes of a message (magic, layout, kind, size) are checked before more is asked for, and no
    size that the other end says is ever used.
    Rule 3: the asker proves first. A stranger who connects gets a nonce and a version, and nothing that was made with
    the token.

    ========  ==================  ====================================================================  =====
    message   from                after the prefix of 8 bytes                                           bytes
    ========  ==================  ====================================================================  =====
    hello     asker               nonce (32), version (32, ASCII, filled up with zeros)                   72
    hello     listener            the same                                                                72
    proof     asker               HMAC-SHA256(token, label "asker", job, epoch, both hellos)              40
    proof     listener            HMAC-SHA256(token, label "listener", job, epoch, both hellos, and the
                                  asker's proof)                                                          40
    ========  ==================  ====================================================================  =====

    The prefix: ``f5 66 72 68``, layout (1 byte), kind (1 byte: 1 to 4 in the order of the table), size of the whole
    message (2 bytes). Numbers are big-endian. In the HMAC the labels end with a zero byte, the job is preceded by its
    length in 4 bytes, the epoch has 8 bytes, and all else has a fixed size, so no two conversations have the same text.
    The label says the role, the hellos hold nonces and versions.

    What an attacker without the token can do:

    * *Read the versions* of both sides, and make a side report a wrong one: they are in the clear, so that mixed
      versions can be told from strangers. A wrong token, job or epoch all look the same.
    * *Guess a weak token offline*: whoever gets a proof, by listening on the wire or by being connected to as if he
      were a worker, can try guesses against it at the speed of a hash. 32 random bytes cannot be guessed; a word can.
    * *Redirect*: the proof says that the other end is of the job, not which worker it is. Who can redirect connections
      can lead an asker to another worker than he meant; the messages that follow say who is who.
    * *Relay and then interfere*: who sits on the wire can pass the proof on and change what comes after it. Against
      that there is only TLS.

    What he cannot do: use what he recorded (each side's nonce is new in every conversation), send a message back to
    whom it came from (kinds and labels differ by direction), use a proof for another job, restart or version.

    Parameters
    ----------
    token : Token
        The secret that both ends must have.
    asks : bool
        Whether this end has connected; False: it has accepted.
    job : str
        The job's name.
    epoch : int
        How often the job was restarted, 0 to 2**64 - 1.
    version : str
        What this end runs: 1 to 32 printable ASCII characters.

    Raises
    ------
    UsageError
        When the epoch or the version is out of range.
    """

    def __init__(self, token: Token, *, asks: bool, job: str, epoch: int, version: str) -> None:
        if not 0 <= epoch <= _MAX_EPOCH:
            raise UsageError(f"an epoch is 0 to 2**64 - 1, got {epoch}")
        if not 0 < len(version) <= VERSION_BYTES or not version.isascii() or not version.isprintable():
            raise UsageError(f"a version is 1 to {VERSION_BYTES} printable ASCII characters, got {version!r}")
        name = job.encode("utf-8", "surrogateescape")
        self._token = token
        self._asks = asks
        self._version = version
        self._context = struct.pack(">I", len(name)) + name + struct.pack(">Q", epoch)
        nonce = secrets.token_bytes(NONCE_BYTES)
        field = version.encode().ljust(VERSION_BYTES, b"\0")
        self._hello = _message(ASKER_HELLO if asks else LISTENER_HELLO, nonce + field)
        self._their_hello = b""
        self._proof = b""  # the asker's, once it is known here
        self._expected = LISTENER_HELLO if asks else ASKER_HELLO
        self._prefix = b""
        self._outgoing = self._hello if asks else b""
        self._wants = PREFIX.size
        self._proved = False

    @property
    def wants(self) -> int:
        """How many bytes ``feed`` needs next, at most 64; 0 when nothing more has to come."""
        return self._wants

    @property
    def done(self) -> bool:
        """Whether the other end has proved itself and nothing is left to send."""
        return self._proved and not self._outgoing

    @property
    def met(self) -> bool:
        """Whether the other end has sent a hello that fits: from here on its silence means that it refuses."""
        return bool(self._their_hello)

    def to_send(self) -> bytes:
        """Return the bytes that have to go out now, once; empty when there are none.

        To be asked after a refusal too: one whose version differs is still told ours.
        """
        outgoing, self._outgoing = self._outgoing, b""
        return outgoing

    def feed(self, data: bytes) -> None:
        """Take the next bytes from the other end.

        Parameters
        ----------
        data : bytes
            Exactly ``wants`` bytes.

        Raises
        ------
        IdentityError
            The other end is refused, with a reason for a log; nothing more is wanted then, and nothing of it is for the
            other end to know.
        UsageError
            Another number of bytes.
        """
        if not self._wants or len(data) != self._wants:
            raise UsageError(f"the handshake wants {self._wants} bytes, got {len(data)}")
        self._wants = 0  # whatever raises below is the end
        if not self._prefix:
            self._wants = self._check_prefix(bytes(data))
            self._prefix = bytes(data)
            return
        message, self._prefix = self._prefix + bytes(data), b""
        if self._expected in (ASKER_HELLO, LISTENER_HELLO):
            self._take_hello(message)
        else:
            self._take_proof(message[PREFIX.size :])

    def end(self, received: bytes) -> None:
        """Take note that the connection ended after ``received``, fewer bytes than are wanted.

        Raises
        ------
        IdentityError
            No worker begins a message so.
        """
        if not self._prefix and not MAGIC.startswith(received[: len(MAGIC)]):
            raise IdentityError(_no_worker(received))

    def _check_prefix(self, prefix: bytes) -> int:
        """Return how many bytes follow it."""
        magic, layout, kind, size = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise IdentityError(_no_worker(prefix))
        if layout != LAYOUT:
            raise IdentityError(
                f"the other end speaks layout {layout} of the handshake, this one layout {LAYOUT} "
                f"(fastref {self._version}): run one version of fastref everywhere",
                their_version=f"handshake {layout}",
            )
        if kind != self._expected:
            both = "both ends of the connection " + ("ask" if self._asks else "listen")
            detail = both if kind in (ASKER_HELLO, LISTENER_HELLO) else "it is out of turn"
            raise IdentityError(f"the other end sent message {kind} where {self._expected} belongs: {detail}")
        right = _SIZE_OF[self._expected]
        if size != right:
            raise IdentityError(f"the other end announced {size} bytes where {right} belong")
        return right - PREFIX.size

    def _take_hello(self, hello: bytes) -> None:
        field = hello[PREFIX.size + NONCE_BYTES :]
        text = field.rstrip(b"\0").decode("ascii", "replace")
        if not self._asks:
            self._outgoing = self._hello  # also to one with another version, who can then say so
        if text != self._version:
            shown = text if text.isascii() and text.isprintable() else repr(text)
            raise IdentityError(
                f"the other end runs version {shown}, this one {self._version}: run one version of fastref everywhere",
                their_version=shown,
            )
        self._their_hello = hello
        if self._asks:
            self._proof = self._prove(_ASKER_LABEL, self._hello, hello)
            self._outgoing = _message(ASKER_PROOF, self._proof)
            self._expect(LISTENER_PROOF)
        else:
            self._expect(ASKER_PROOF)

    def _take_proof(self, proof: bytes) -> None:
        if self._asks:
            right = self._prove(_LISTENER_LABEL, self._hello, self._their_hello, self._proof)
        else:
            right = self._prove(_ASKER_LABEL, self._their_hello, self._hello)
        if not hmac.compare_digest(proof, right):
            raise IdentityError(
                "the other end did not prove that it belongs to the job: its token, job name or restart count differs"
            )
        if not self._asks:
            mine = self._prove(_LISTENER_LABEL, self._their_hello, self._hello, proof)
            self._outgoing = _message(LISTENER_PROOF, mine)
        self._proved = True

    def _prove(self, label: bytes, *said: bytes) -> bytes:
        return self._token.authenticate(label, self._context, *said)

    def _expect(self, kind: int) -> None:
        self._expected = kind
        self._wants = PREFIX.size


def _message(kind: int, body: bytes) -> bytes:
    return PREFIX.pack(MAGIC, LAYOUT, kind, PREFIX.size + len(body)) + body


def _no_worker(received: bytes) -> str:
    hint = next((said for start, said in _HINTS if received.startswith(start)), "it is no fastref worker")
    return f"the other end began with {received.hex(' ')}: {hint}"
