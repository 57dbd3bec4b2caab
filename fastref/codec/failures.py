"""Exceptions on their way to the caller: the exception itself, its traceback as text, and torch's wording."""

from __future__ import annotations

import functools
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any, cast

import cloudpickle

from fastref.errors import RemoteError

__all__ = ["encode_failure", "decode_failure", "raised_again"]

logger = logging.getLogger("fastref")

LONGEST_TEXT = 1 << 20  # characters of traceback that travel; a recursion error can have far more


def encode_failure(error: BaseException, worker: Any) -> bytes:
    """Return what the caller needs to raise ``error`` again. ``worker``: where it was raised."""
    text = f"On {worker}:\n{_safely(repr, error)}\n{_traceback(error)}"[:LONGEST_TEXT]
    original = error
    if isinstance(error, RemoteError) and error.__cause__ is not None:
        original = error.__cause__  # raised further away; its type is what callers look for
    return pickle.dumps((text, _traceback(error)[:LONGEST_TEXT], _pickled(original)))


def decode_failure(data: bytes) -> BaseException:
    """Return the exception to raise on the caller: a ``RemoteError`` and, where possible, the original's type too."""
    text, remote_traceback, pickled = pickle.loads(data)
    original = None
    if pickled is not None:
        try:
            original = pickle.loads(pickled)
        except Exception as error:  # its class is not here, or does not like its own arguments
            text += f"\n(the exception itself could not be rebuilt here: {_safely(repr, error)})"
    if not isinstance(original, BaseException):
        original = None
    return raised_again(original, text, remote_traceback)


def raised_again(original: BaseException | None, text: str, remote_traceback: str) -> RemoteError:
    """Make the exception that a caller sees from what the callee raised."""
    kind = RemoteError
    if isinstance(original, Exception):  # SystemExit and its like must not end the caller too
        kind = _both(type(original))  # type: ignore[arg-type]  # every class is hashable
    try:
        error = kind.__new__(kind, text)
        error.args = (text,)
        if original is not None:
            error.__dict__.update(original.__dict__)
    except Exception:  # a class whose instances cannot be made without its own __init__
        error = RemoteError(text)
    error.remote_traceback = remote_traceback
    error.__cause__ = original
    return error


@functools.lru_cache(maxsize=256)
def _both(original: type[BaseException]) -> type[RemoteError]:
    if issubclass(original, RemoteError):
        return original
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__str__": RemoteError.__str__}
    names["__init__"] = RemoteError.__init__
    names["__reduce__"] = _reduce
    try:
        return cast(type[RemoteError], type(original.__name__, (RemoteError, original), names))
    except TypeError:  # a layout or metaclass that does not mix
        return RemoteError


def _reduce(error: BaseException) -> tuple:
    return raised_again, (error.__cause__, str(error), getattr(error, "remote_traceback", ""))


def _pickled(error: BaseException) -> bytes | None:
    for dumps in (pickle.dumps, cloudpickle.dumps):
        try:
            data = dumps(error)
            pickle.loads(data)  # many classes pickle and then refuse their own arguments
        except Exception as refusal:
            logger.debug("%s refused: %s", type(error).__qualname__, type(refusal).__qualname__)
        else:
            return data
    return None


def _traceback(error: BaseException) -> str:
    return _safely(lambda e: "".join(traceback.format_exception(type(e), e, e.__traceback__)), error)


def _safely(show: Callable[[BaseException], str], error: BaseException) -> str:
    try:
        return show(error)
    except Exception as trouble:
        kind = type(error)
        return f"<{kind.__module__}.{kind.__qualname__}, whose text cannot be made: {type(trouble).__name__}>"
