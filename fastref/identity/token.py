"""The token of a job: where it comes from, and that it shows up nowhere."""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from fastref.errors import ResourceError, UsageError

__all__ = [
    "TOKEN_FILE_VARIABLE",
    "TOKEN_VARIABLE",
    "Token",
    "find_token",
    "forget_loopback_token",
    "loopback_token",
    "mint",
    "refuse_without_token",
]

TOKEN_VARIABLE = "FASTREF_TOKEN"
TOKEN_FILE_VARIABLE = "FASTREF_TOKEN_FILE"
MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 4096

LOOPBACK_TOKEN_NAME = "token"
_UNFINISHED_NAME = re.compile(r"token\.[0-9a-f]{16}\.new")
_LOCK_PATIENCE_S = 5.0

_MINT_LINE = f"export {TOKEN_VARIABLE}=$(python -c 'import secrets; print(secrets.token_hex(32))')"


class Token:
    """The secret that the workers of one job share.

    Its text is nowhere to be seen: ``repr``, ``str`` and error messages show that there is one, pickling is refused,
    and comparing takes the same time wherever two tokens differ.

    Parameters
    ----------
    secret : bytes
        16 to 4,096 bytes, as random as can be: who has listened to one handshake can try guesses in peace.

    Raises
    ------
    UsageError
        When it is shorter or longer.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if not MIN_TOKEN_BYTES <= len(secret) <= MAX_TOKEN_BYTES:
            raise UsageError(
                f"a token has {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} bytes, this one has {len(secret)}: {_MINT_LINE}"
            )
        self._secret = bytes(secret)

    @classmethod
    def from_text(cls, text: str) -> Token:
        """Return the token that ``text`` says, without the white space around it.

        Raises
        ------
        UsageError
            When it is too short or too long.
        """
        try:
            secret = os.fsencode(text.strip())
        except UnicodeEncodeError:
            raise UsageError(f"a token is text that can be written to a file, this one cannot: {_MINT_LINE}") from None
        return cls(secret)

    def authenticate(self, *parts: bytes) -> bytes:
        """Return HMAC-SHA256 of the parts one after the other, 32 bytes. The caller keeps them from blurring."""
        return hmac.digest(self._secret, b"".join(parts), "sha256")

    def text(self) -> str:
        """Return the secret itself, for the environment of a child."""
        return os.fsdecode(self._secret)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Token):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    def __repr__(self) -> str:
        return "<Token>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a token is not pickled; hand it on in the environment or in a file")

    def __copy__(self) -> Token:
        return self

    def __deepcopy__(self, memo: object) -> Token:
        return self


def mint() -> Token:
    """Return a new token: 32 random bytes, written as 64 hex digits."""
    return Token(secrets.token_hex(32).encode())


def find_token(option: str | None, environ: Mapping[str, str] | None = None) -> Token | None:
    """Return the token that the program was given, None when it was given none.

    The first of these: the option ``token``, ``FASTREF_TOKEN``, the file that ``FASTREF_TOKEN_FILE`` names. A variable
    that is empty is not set.

    Parameters
    ----------
    option : str or None
        What ``RpcBackendOptions(token=...)`` says.
    environ : mapping, optional
        The environment; by default that of this process.

    Raises
    ------
    UsageError
        The token is too short or too long; or the file is missing, no regular file, a symbolic link, of another user,
        or open to others. The message says what mends it.
    """
    if option is not None:
        return Token.from_text(option)
    if environ is None:  # as a default in the signature it would show there
        environ = os.environ
    if text := environ.get(TOKEN_VARIABLE, "").strip():
        return Token.from_text(text)
    if path := environ.get(TOKEN_FILE_VARIABLE, ""):
        try:
            return _read_token_file(Path(path))
        except OSError as error:
            raise UsageError(f"{TOKEN_FILE_VARIABLE}: cannot read {path}: {error.strerror}") from error
    return None


def refuse_without_token(endpoint: str) -> NoReturn:
    """Refuse to listen at ``endpoint``, which others than this host reach, without a token of the program's.

    Raises
    ------
    UsageError
        Always; with the line that gives a token.
    """
    raise UsageError(
        f"listening at {endpoint}, beyond loopback, needs a token that all workers of the job share, since whoever "
        f"gets in can run any code: {_MINT_LINE}, and the same value on every host"
    )


def loopback_token(directory: Path) -> Token:
    """Return the token that the workers of one job, one user and one host share without being given one.

    It lies in ``directory`` as ``token``, mode 0600. Whoever comes first makes it: under another name, whole, then
    linked to its own, so that nobody ever reads half of one and all who come at once end up with the same.

    Parameters
    ----------
    directory : Path
        Private to the user. Put something of the worker's own into it before, and take that away before
        ``forget_loopback_token``: then a token is never taken away from one who has read it.

    Raises
    ------
    UsageError
        What lies there is no private file of this user, or no token.
    ResourceError
        It cannot be made.
    """
    path = directory / LOOPBACK_TOKEN_NAME
    unfinished = directory / f"{LOOPBACK_TOKEN_NAME}.{secrets.token_hex(8)}.new"
    try:
        with _locked(directory, fcntl.LOCK_SH):
            with contextlib.suppress(FileNotFoundError):
                return _read_token_file(path)
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fd, "w") as file:
                    file.write(mint().text())
                with contextlib.suppress(FileExistsError):  # somebody else was faster: his token it is
                    os.link(unfinished, path, follow_symlinks=False)
            finally:
                unfinished.unlink(missing_ok=True)
            return _read_token_file(path)
    except OSError as error:
        raise ResourceError(f"cannot make the token {path}: {error.strerror}") from error


def forget_loopback_token(directory: Path) -> bool:
    """Remove the token of a job when nothing else is left in its directory; return whether it is gone.

    For whoever leaves, and for whoever sweeps: a directory with a token in it is never empty.
    """
    try:
        with _locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            names = os.listdir(directory)
            if any(name != LOOPBACK_TOKEN_NAME and not _UNFINISHED_NAME.fullmatch(name) for name in names):
                return False
            for name in names:
                (directory / name).unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except OSError:
        return False  # somebody comes just now, or it is not ours


def _read_token_file(path: Path) -> Token:
    """Return what the file says; what is checked is the very file that is read, whatever its name means later."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise UsageError(f"the token file {path} is a symbolic link; name the file itself") from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"the token file {path} is no regular file")
        if status.st_uid != os.geteuid():
            raise UsageError(
                f"the token file {path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: "
                f"give every user a copy of his own, or use {TOKEN_VARIABLE}"
            )
        if status.st_mode & 0o177:
            raise UsageError(f"the token file {path} has mode {status.st_mode & 0o7777:04o}: chmod 600 {path}")
        content = os.read(fd, MAX_TOKEN_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_TOKEN_BYTES:
        raise UsageError(f"the token file {path} is longer than {MAX_TOKEN_BYTES} bytes")
    return Token(content.strip())


@contextlib.contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    """Hold a lock on the directory within the block; it goes with the process.

    Raises
    ------
    OSError
        The directory cannot be opened, or somebody holds the lock for longer than a few system calls take.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if how & fcntl.LOCK_NB or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        yield
    finally:
        os.close(fd)
