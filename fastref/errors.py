"""Every error fastref raises, as one tree.

``FastrefError`` derives from ``RuntimeError``, so that programs written for
``torch.distributed.rpc``, which catch ``RuntimeError``, keep working.
"""

from __future__ import annotations

__all__ = [
    "FastrefError",
    "UsageError",
    "NotInitialized",
    "ForkedProcessError",
    "IdsExhausted",
    "StrictModeError",
    "PeerError",
    "WorkerDied",
    "OwnerDied",
    "ReferenceLost",
    "CallTimeout",
    "IdentityError",
    "RemoteError",
    "BackwardError",
    "ProtocolError",
    "ResourceError",
    "RendezvousError",
]


class FastrefError(RuntimeError):
    """Base of every error that fastref raises on its own account."""


class UsageError(FastrefError):
    """The program broke a rule of the API."""


class NotInitialized(UsageError):
    """A call was made before ``init_rpc`` or after ``shutdown``."""


class ForkedProcessError(UsageError):
    """A child made by ``os.fork`` touched the runtime of its parent."""


class IdsExhausted(UsageError):
    """A worker has minted all ids that 48 bits can number."""


class StrictModeError(UsageError):
    """A strict job does not take this: what is not plain data, a callable or a method that is not registered, a pickle.

    Raised where it would have been sent, or else by the worker that refuses it.
    """


class ResourceError(FastrefError):
    """The system refused memory, descriptors or shared memory; nothing was lost."""


class RendezvousError(FastrefError):
    """The workers of a job could not agree on who they are."""


class PeerError(FastrefError):
    """The other end, or the way to it, failed.

    Attributes
    ----------
    worker : str
        Name of the worker at the other end, empty when it is not known.
    """

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message)
        self.worker = worker

    def __reduce__(self) -> tuple:
        return (_rebuild_peer_error, (type(self), str(self), dict(self.__dict__)))


class WorkerDied(PeerError):
    """The process at the other end is gone.

    Attributes
    ----------
    name, rank, pid
        The worker as it was known to the job.
    left : bool
        It said goodbye before it went.
    """

    def __init__(self, name: str, rank: int, pid: int, detail: str = "", left: bool = False) -> None:
        message = f"worker {name!r} (rank {rank}, pid {pid}) {'has left' if left else 'died'}"
        super().__init__(f"{message}: {detail}" if detail else message, name)
        self.name, self.rank, self.pid, self.left = name, rank, pid, left


class OwnerDied(WorkerDied):
    """The process that owned a reference is gone, and the value with it."""


class ReferenceLost(PeerError):
    """A reference ended before it could be taken: its sender died on the way, or others took its holder for dead."""


class CallTimeout(PeerError):
    """A call, fetch or wait ran past its deadline."""


class IdentityError(PeerError):
    """The other end of a connection did not prove that it belongs to the job, or did not take the proof of this end.

    Attributes
    ----------
    their_version : str
        What it says that it runs, when that is why; empty otherwise. Nobody has vouched for it.
    """

    def __init__(self, message: str, worker: str = "", their_version: str = "") -> None:
        super().__init__(message, worker)
        self.their_version = their_version


class BackwardError(FastrefError):
    """A distributed backward pass has ended without gradients: a function in it raised, or its context was let go of.

    What was raised is in a note of it, with its traceback.
    """


class ProtocolError(FastrefError):
    """A peer sent something that no correct peer sends."""


class RemoteError(FastrefError):
    """A function that was called on another worker raised.

    It is raised as a subclass, made on the spot, of ``RemoteError`` and of the
    original type, so that ``except ValueError`` and ``except RemoteError`` both work.

    Attributes
    ----------
    remote_traceback : str
        The traceback as text, formatted where the function ran.
    shown : str
        The original's ``repr``, made there too.
    __cause__ : BaseException or None
        The original exception, when it could be pickled.
    """

    remote_traceback: str = ""
    shown: str = ""  # the original's repr, made where it was raised
    _original: type | None = None

    def __repr__(self) -> str:
        return self.shown or f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def _rebuild_peer_error(kind: type[PeerError], message: str, state: dict) -> PeerError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error
