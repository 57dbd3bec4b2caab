"""What a frame can be. Names are torch's where torch has the message."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """First field of every frame. The values are mirrored in ``frame.pxd``; a test keeps them equal."""

    PYTHON_CALL = 1  # run a function or a method of a reference, answer with the result
    PYTHON_RET = 2  # the answer: a result, or an exception
    PYTHON_REMOTE_CALL = 3  # run, and keep the result under the entry that the frame names first
    RREF_FETCH_CALL = 4  # answer with the value of the entry that the frame names first
    RREF_USER_DELETE = 5  # a holder that goes by messages lets forks go
    RREF_FORK_REQUEST = 6  # a holder that goes by messages asks the owner to register a fork
    RREF_FORK_ACCEPT = 7  # the owner's answer to it
    RREF_CHILD_ACCEPT = 8  # the new holder tells its parent that the owner knows
    GRANT = 9  # the owner opens entries ahead for a peer's remote() calls
    CREDIT_REQUEST = 10  # a peer has used up its entries
    INTERN = 11  # from here on this number stands for this callable
    DRAIN_ASK = 12  # a worker is dead: acquire all that it published, then say so
    DRAIN_DONE = 13
    IDLE_REPORT = 14  # this worker wants to shut down and is idle
    GREETING = 15  # the first frame on a link: which file is __main__ here
    LEAVING = 16  # this worker leaves a group that goes on: call it no more
    FAREWELL = 17  # the answer: none of my calls follows
    SETTLED = 18  # a value that a worker of another host made by remote() is there, or never will be
    DELETES_ASK = 19  # the owner is short of entries: send every delete that waits, then say so
    DELETES_DONE = 20
    CLEANUP_AUTOGRAD_CONTEXT_REQ = 21  # let go of an autograd context, and have those do so whom this worker told of it
