"""Exceptions on their way to the caller: the exception or its class, its traceback as text, and torch's wording."""

from __future__ import annotations

import builtins
import functools
import logging
import pickle
import traceback
from collections.abc import Callable, Hashable
from typing import Any, cast

from fastref import errors
from fastref.codec import mainmodule
from fastref.codec.pickling import dumps, loads
from fastref.codec.stream import decode, encode
from fastref.errors import ProtocolError, RemoteError, StrictModeError

__all__ = ["decode_failure", "decode_plain_failure", "encode_failure", "encode_plain_failure", "raised_again"]

logger = logging.getLogger("fastref")

LONGEST_TEXT = 1 << 20  # characters of traceback that travel; a recursion error can have far more
# What OSError keeps outside its __dict__.
_SLOTS = ("errno", "strerror", "filename", "filename2")


def encode_failure(error: BaseException, worker: Any) -> bytes:
    """Return what the caller needs to raise ``error`` again. ``worker``: where it was raised."""
    original, kind = _origin(error)
    shown, trace = _safely(repr, error)[:LONGEST_TEXT], _traceback(error)[:LONGEST_TEXT]
    forms = [("", _pickled(original, False), _pickled(kind, False))]
    if mainmodule.owns(kind):  # by name for callers that run the same script, by value for others
        forms.insert(0, (mainmodule.fingerprint(), _pickled(original, True), _pickled(kind, True)))
    return pickle.dumps((str(worker), shown, trace, forms))


def decode_failure(data: bytes) -> BaseException:
    """Return the exception to raise on the caller: a ``RemoteError`` and, where possible, the original's type too."""
    worker, shown, remote_traceback, forms = pickle.loads(data)
    text = f"On {worker}:\n{shown}\n{remote_traceback}"
    script = mainmodule.fingerprint()
    instance, kind = next((one, other) for digest, one, other in forms if digest in ("", script))
    original = _unpickled(instance, BaseException)
    kind = _unpickled(kind, type) if original is None else type(original)
    return raised_again(kind, original, text, remote_traceback, shown)


def _origin(error: BaseException) -> tuple[BaseException, type]:
    """Return what was raised at first, and its class: of what was raised further away callers look for these."""
    if isinstance(error, RemoteError):
        return error.__cause__ or error, getattr(type(error), "_original", type(error))
    return error, type(error)


# The classes that exceptions of strict jobs can have; groups are made of other exceptions.
_PLAIN: dict[str, type[Exception]] = {
    name: kind
    for names in (vars(builtins), vars(errors))
    for name, kind in names.items()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, BaseExceptionGroup)
}
# What they keep outside their arguments.
_ATTRIBUTES = frozenset(("filename", "filename2", "left", "name", "pid", "rank", "their_version", "worker"))


def encode_plain_failure(error: BaseException, worker: Any) -> bytes:
    """As ``encode_failure``, in plain data: the nearest class that all workers know; arguments if they are plain."""
    original, kind = _origin(error)
    texts = [str(worker), _safely(repr, error)[:LONGEST_TEXT], _traceback(error)[:LONGEST_TEXT]]
    texts = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
    name = next((base.__name__ for base in kind.__mro__ if _PLAIN.get(base.__name__) is base), "")
    if _PLAIN.get(name) is type(original):
        attributes = {
            at: getattr(original, at) for at in _ATTRIBUTES if isinstance(getattr(original, at, None), str | int)
        }
        references: list = []
        data = encode((*texts, name, original.args, attributes), references)
        if data is not None and not references:  # they travel in frames only
            return data
    data = encode((*texts, name, None, {}))
    assert data is not None  # three texts and a name
    return data


def decode_plain_failure(data: bytes) -> BaseException:
    """As ``decode_failure``, of what ``encode_plain_failure`` made; what is anything else is refused."""
    try:
        worker, shown, remote_traceback, name, args, attributes = decode(data)
        kind = _PLAIN.get(name)
        text = f"On {worker}:\n{shown}\n{remote_traceback}"
        original = None if kind is None or args is None else _remade(kind, tuple(args), dict(attributes))
    except (ProtocolError, TypeError, ValueError):
        return StrictModeError(f"an exception came as {len(data)} bytes that are no plain data; this worker is strict")
    return raised_again(kind, original, text, str(remote_traceback), str(shown))


def _remade(kind: type[Exception], args: tuple, attributes: dict) -> Exception | None:
    try:
        if kind.__module__ == errors.__name__:
            error = kind.__new__(kind, *args)
        else:
            error = kind(*args)
        for name in _ATTRIBUTES & attributes.keys():
            if isinstance(attributes[name], str | int):
                setattr(error, name, attributes[name])
    except Exception as refusal:  # arguments that are none of this class
        logger.debug("%s refused: %s", kind.__qualname__, type(refusal).__qualname__)
        return None
    return error


def raised_again(
    kind: type | None, original: BaseException | None, text: str, remote_traceback: str, shown: str
) -> RemoteError:
    """Make the exception that a caller sees from what the callee raised.

    Parameters
    ----------
    kind : type or None
        The class of what was raised; None when it is not known here.
    original : BaseException or None
        What was raised; None when it could not be pickled.
    text, remote_traceback, shown : str
        The message, the traceback where the function ran, and the original's ``repr``.
    """
    both = RemoteError
    if kind is not None and issubclass(kind, Exception):  # SystemExit and its like must not end the caller too
        both = _both(cast(Hashable, kind))
    try:
        # The original's own __new__: that of RemoteError refuses to make instances with another layout.
        parts = original.args[1:] if isinstance(original, BaseExceptionGroup) else ()
        error = _made(kind, both, text, parts) if both is not RemoteError else RemoteError(text)
        error.args = (text,)
        if original is not None:
            error.__dict__.update(original.__dict__)
            if isinstance(original, OSError):
                for name in _SLOTS:
                    setattr(error, name, getattr(original, name))
    except Exception as refusal:  # a class whose instances cannot be made without its own __init__
        logger.debug("%s refused: %s", both.__qualname__, type(refusal).__qualname__)
        error = RemoteError(text)
    # Past the class's own __setattr__, which may refuse.
    error.__dict__.update(remote_traceback=remote_traceback, shown=shown)
    error.__cause__ = original
    return error


def _made(kind: Any, both: type[RemoteError], text: str, parts: tuple) -> RemoteError:
    try:
        return cast(RemoteError, kind.__new__(both, text, *parts))
    except TypeError:  # MemoryError: a layout like any other's, with a __new__ of its own
        return RuntimeError.__new__(both, text)


@functools.lru_cache(maxsize=256)
def _both(original: type[Exception]) -> type[RemoteError]:
    if issubclass(original, RemoteError):
        return original
    names: dict[str, Any] = {
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__init__": RemoteError.__init__,
        "__str__": RemoteError.__str__, "__repr__": RemoteError.__repr__, "__reduce__": _reduce, "_original": original,
        "__setattr__": BaseException.__setattr__,
    }  # fmt: skip
    try:
        return cast(type[RemoteError], type(original.__name__, (RemoteError, original), names))
    except Exception as refusal:  # a layout or metaclass that does not mix, an __init_subclass__ that objects
        logger.debug("%s refused: %s", original.__qualname__, type(refusal).__qualname__)
        return RemoteError


def _reduce(error: Any) -> tuple:
    return raised_again, (error._original, error.__cause__, str(error), error.remote_traceback, error.shown)


Pickle = tuple[bytes, list[bytes]]


def _pickled(value: Any, shares_main: bool) -> Pickle | None:
    """Pickle an exception or a class; None when that cannot be done or undone."""
    references: list = []
    try:
        data, buffers = dumps(value, references, shares_main)
        if references:  # they travel in frames only
            return None
        found = data, [bytes(buffer) for buffer in buffers]
        _load(found)  # many classes pickle and then refuse their own arguments
    except BaseException as refusal:  # code of the program, which may raise anything
        logger.debug("%r refused: %s", type(value), type(refusal).__qualname__)
        return None
    return found


def _unpickled(pickled: Pickle | None, kind: type) -> Any:
    """Return the object in a pickle if it is of a kind; None when it cannot be had here."""
    if pickled is None:
        return None
    try:
        value = _load(pickled)
    except BaseException as refusal:
        logger.debug("an exception could not be rebuilt: %s", type(refusal).__qualname__)
        return None
    return value if isinstance(value, kind) else None


def _load(pickled: Pickle) -> Any:
    data, buffers = pickled
    return loads(data, [bytearray(buffer) for buffer in buffers], [])


def _traceback(error: BaseException) -> str:
    return _safely(lambda e: "".join(traceback.format_exception(type(e), e, e.__traceback__)), error)


def _safely(show: Callable[[BaseException], str], error: BaseException) -> str:
    try:
        return show(error)
    except BaseException as trouble:
        kind = type(error)
        return f"<{kind.__module__}.{kind.__qualname__}, whose text cannot be made: {type(trouble).__name__}>"
