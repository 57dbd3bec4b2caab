"""The shipped rules as values: a model keeps them frozen, and a step runs the very code of the product.

The classes of `fastref.protocol` do no I/O and know no clock: what a call does depends on what the object holds and on
the arguments alone. So a frozen object stands for it, and what a call made of it is remembered.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

__all__ = ["Frozen", "freeze", "perform"]


class Frozen:
    """An object with all that it holds. Two of equal content are one and the same, so they compare and hash fast.

    Parameters
    ----------
    kind : its class
    contents : its attributes, as `_pack` made them
    """

    __slots__ = ("contents", "kind")

    def __init__(self, kind: type, contents: tuple) -> None:
        self.kind, self.contents = kind, contents


_known: dict[tuple, Frozen] = {}
_done: dict[tuple, tuple[Frozen, Any]] = {}


def freeze(thing: object) -> Frozen:
    """Return what stands for an object as it is now."""
    key = type(thing), _pack(vars(thing))
    frozen = _known.get(key)
    if frozen is None:
        frozen = _known[key] = Frozen(*key)
    return frozen


def perform(frozen: Frozen, method: str, *args: Hashable) -> tuple[Frozen, Any]:
    """Call a method of a frozen object.

    Returns
    -------
    tuple
        The object afterwards, frozen, and what the method returned, a list as a tuple.
    """
    key = (frozen, method, args)
    done = _done.get(key)
    if done is None:
        thing = frozen.kind.__new__(frozen.kind)
        vars(thing).update(_unpack(frozen.contents))
        returned = getattr(thing, method)(*args)
        done = _done[key] = freeze(thing), tuple(returned) if isinstance(returned, list) else returned
    return done


def _pack(value: Any) -> Any:
    """Return a value as a hashable one that says of what kind it was."""
    if isinstance(value, int | str | None):
        return value
    if isinstance(value, dict):
        return (dict, *sorted((_pack(key), _pack(item)) for key, item in value.items()))
    if isinstance(value, set):
        return (set, *sorted(map(_pack, value)))
    if isinstance(value, tuple | list):
        return (type(value), *map(_pack, value))
    return (type(value), _pack(vars(value)))


def _unpack(packed: Any) -> Any:
    if isinstance(packed, int | str | None):
        return packed
    kind, *parts = packed
    if kind is dict:
        return {_unpack(key): _unpack(item) for key, item in parts}
    if kind in (set, list, tuple):
        return kind(map(_unpack, parts))
    if issubclass(kind, tuple):  # a named one
        return kind(*map(_unpack, parts))
    thing = kind.__new__(kind)
    vars(thing).update(_unpack(parts[0]))
    return thing
