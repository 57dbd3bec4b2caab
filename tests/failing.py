"""Functions, exceptions and values that do what they should not, for other workers to meet."""

from __future__ import annotations

import sys
import threading
from typing import Any

import fastref.rpc as rpc
from tests import work


class WithoutArguments(Exception):
    """An exception whose constructor takes nothing."""

    def __init__(self) -> None:
        super().__init__("always the same")


class Demanding(Exception):
    """An exception whose constructor wants more than its args say."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"code {code}: {reason}")
        self.code, self.reason = code, reason


class Complete(Exception):
    """An exception that tells pickle how it is made."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"code {code}: {reason}")
        self.code, self.reason = code, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return Complete, (self.code, self.reason)


class Holding(ValueError):
    """An exception with an attribute that no pickle takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Slotted(Exception):
    __slots__ = ("extra",)

    def __init__(self, text: str, extra: int = 0) -> None:
        super().__init__(text)
        self.extra = extra


class Speechless(Exception):
    """An exception that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Stubborn(Exception):
    """An exception that refuses to be pickled and that refuses attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("not me")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class Escaping(Exception):
    """An exception that tries to end whoever handles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        sys.exit(5)

    def __repr__(self) -> str:
        sys.exit(6)


class Own(BaseException):
    """No Exception at all."""


def raise_it(error: BaseException) -> None:
    raise error


def make_and_raise(kind: str, *args: Any, **kwargs: Any) -> None:
    """Raise an exception that is made here, by the name of its class."""
    raise getattr(sys.modules[__name__], kind)(*args, **kwargs)


def raise_from(text: str, cause: str) -> None:
    try:
        raise KeyError(cause)
    except KeyError as error:
        raise ValueError(text) from error


def raise_group() -> None:
    raise ExceptionGroup("two", [ValueError("one"), OSError(2, "other")])


def raise_local() -> None:
    class Local(ValueError):
        pass

    raise Local("of a class nobody can import")


def raise_deep() -> None:
    raise_deep()


def exit_the_process() -> None:
    sys.exit(3)


def raise_through(route: list[str], kind: str, *args: Any, **kwargs: Any) -> None:
    """Raise an exception at the end of a route of nested calls."""
    if not route:
        make_and_raise(kind, *args, **kwargs)
    rpc.rpc_sync(route[0], raise_through, args=(route[1:], kind, *args), kwargs=kwargs)


def outer(text: str) -> None:
    inner_function_with_a_name(text)


def inner_function_with_a_name(text: str) -> None:
    raise ValueError(text)


class RaisesWhenPickled:
    def __reduce__(self) -> Any:
        raise ZeroDivisionError("while pickling")


def _explode() -> None:
    raise ZeroDivisionError("while unpickling")


class RaisesWhenUnpickled:
    def __reduce__(self) -> Any:
        return _explode, ()


class ExitsWhenUnpickled:
    def __reduce__(self) -> Any:
        return sys.exit, (4,)


def make(kind: str) -> Any:
    """Return an object of a class of this module."""
    return getattr(sys.modules[__name__], kind)()


def make_lock() -> Any:
    return threading.Lock()


def make_generator() -> Any:
    yield 1


def make_frame() -> Any:
    return sys._getframe()


def keep_lock() -> rpc.RRef:
    work.keep(threading.Lock())
    return rpc.RRef(work.get_kept())
