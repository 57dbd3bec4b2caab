"""What peers of a strict job may call: functions and classes by registered names, and methods of registered classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from fastref.errors import ProtocolError, StrictModeError, UsageError

__all__ = ["by_name", "find_method", "find_registered", "name_of", "register"]

F = TypeVar("F", bound=Callable[..., Any])

by_name: dict[str, Any] = {}
"""Name -> callable. There is one for the process, since modules register what they define when they are imported."""
_names: dict[Any, str] = {}

# Those that read or change a value, as a container or a function does; none that makes, copies or takes apart objects.
_SPECIAL = frozenset(
    ("__call__", "__contains__", "__delitem__", "__getitem__", "__iadd__", "__len__", "__setitem__")
)  # fmt: skip


@overload
def register(function: F, name: str | None = None) -> F: ...


@overload
def register(function: None = None, name: str | None = None) -> Callable[[F], F]: ...


def register(function: Any = None, name: str | None = None) -> Any:
    """Let other workers of a strict job call a function, a class or a method. Other jobs ask for no such thing.

    As ``@register``, ``@register(name="sum")`` or ``register(torch.add, "torch.add")``. Register on caller and callee,
    under the same name, best by a module that both import; the callee runs what *it* has under the name.

    Of values whose class is registered the public methods may be called through references: those without a leading
    underscore, and ``__call__``, ``__len__``, ``__contains__`` and ``__getitem__``, ``__setitem__``, ``__delitem__``,
    ``__iadd__``, as far as they are written in the body of a registered class. A method of another class can be
    registered by itself. With ``async_execution`` it is the outer decorator.

    Parameters
    ----------
    function : callable
    name : str, optional
        By default the module and the qualified name, ``__main__`` for both names that this module can have.

    Returns
    -------
    callable
        ``function``, or without one a decorator.

    Raises
    ------
    TypeError
        It is not callable, or not hashable.
    UsageError
        Something else has the name, or it has none of its own and was given none.
    """
    if function is None:
        return lambda function: register(function, name)
    found = function.__func__ if isinstance(function, staticmethod | classmethod) else function
    if not callable(found):
        raise TypeError(f"only what can be called can be registered, not {function!r}")
    if name is None:
        name = _own_name(found)
        if name is None:
            raise UsageError(f"{found!r} has no name of its own: register(function, name)")
    elif not isinstance(name, str) or not name:
        raise TypeError(f"a name is a string, got {name!r}")
    known = by_name.get(name)
    # A module that is loaded again defines the same things again.
    if known is not None and known is not found and (_own_name(known) is None or _own_name(known) != _own_name(found)):
        raise UsageError(f"{known!r} is registered as {name!r} already")
    _names[found] = name
    if known is not None and known is not found and _names.get(known) == name:
        del _names[known]
    by_name[name] = found
    return function


def _own_name(function: Any) -> str | None:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    return f"{'__main__' if module == '__mp_main__' else module}.{qualname}"


def name_of(function: Any) -> str:
    """Return the name under which a callable is registered.

    Raises
    ------
    StrictModeError
        It is not.
    """
    name = _registered(function)
    if name is None:
        raise StrictModeError(
            f"{function!r} is not registered, and a strict job calls nothing else: decorate it with "
            "fastref.rpc.register, in a module that caller and callee import"
        )
    return name


def find_registered(known: dict[int, Any], number: int, caller: Any) -> Any:
    """Return what is registered here under the name that the caller introduced as ``number``.

    Raises
    ------
    StrictModeError
        Nothing is, or what the caller said is no registered name.
    ProtocolError
        It has introduced nothing as that number.
    """
    try:
        name = known[number]
    except KeyError:
        raise ProtocolError(f"{caller} calls number {number}, which it never introduced") from None
    if not isinstance(name, str):
        raise StrictModeError(
            f"{caller} calls {_shown(name)}, and this worker is strict: it takes registered names only"
        )
    try:
        return by_name[name]
    except KeyError:
        raise StrictModeError(
            f"{caller} calls {_shown(name)}, which is not registered here: decorate it with fastref.rpc.register, in a "
            "module that this worker imports too"
        ) from None


def find_method(value: Any, name: Any) -> Any:
    """Return a method of a value, if peers may call it. It is looked up in the classes, and nothing of them is run.

    Raises
    ------
    StrictModeError
        They may not, or there is none of that name.
    """
    kind = type(value)
    for home in kind.__mro__ if isinstance(name, str) else ():
        if name in vars(home):
            method = vars(home)[name]
            function = method.__func__ if isinstance(method, staticmethod | classmethod) else method
            is_public = not name.startswith("_") or name in _SPECIAL
            if _registered(function) or (is_public and _registered(home) and _is_routine(function)):
                return method.__get__(value, kind)
            break
    raise StrictModeError(
        f"{_shown(name)} is no method of {kind.__module__}.{kind.__qualname__} that other workers of a strict job may "
        "call: those are the public ones in the body of a class that is decorated with fastref.rpc.register, and those "
        "that are decorated themselves"
    )


def _is_routine(function: Any) -> bool:
    """Tell functions and methods, compiled ones too, from other things that a class can have: they bind."""
    return callable(function) and not isinstance(function, type) and hasattr(type(function), "__get__")


def _registered(function: Any) -> str | None:
    try:
        return _names.get(function)
    except TypeError:  # not hashable
        return None


def _shown(name: Any) -> str:
    return repr(name)[:200]
