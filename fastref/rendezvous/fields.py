"""Reading JSON that a peer sent: every field is checked, and an error names it."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastref.errors import ProtocolError

__all__ = ["read_flag", "read_integer", "read_list", "read_object", "read_text", "parse_object"]

MAX_TEXT_CHARACTERS = 4096

T = TypeVar("T")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises
    ------
    ProtocolError
        It is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a peer sent {len(data)} bytes that are no message: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"a peer sent a JSON {type(value).__name__} where a message is an object")
    return value


def read_text(fields: dict[str, Any], name: str, *, least: int = 1, most: int = MAX_TEXT_CHARACTERS) -> str:
    """Return the text in field ``name``, of ``least`` to ``most`` characters."""
    value = _read(fields, name, str)
    if not least <= len(value) <= most:
        raise ProtocolError(f"field {name!r} must have {least} to {most} characters, it has {len(value)}")
    return value


def read_integer(fields: dict[str, Any], name: str, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """Return the integer in field ``name``, from ``least`` to ``most``."""
    value = _read(fields, name, int)
    if isinstance(value, bool) or not least <= value <= most:
        raise ProtocolError(f"field {name!r} must be an integer from {least} to {most}, it is {value!r}")
    return value


def read_flag(fields: dict[str, Any], name: str) -> bool:
    """Return the truth value in field ``name``."""
    return _read(fields, name, bool)


def read_object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the object in field ``name``."""
    return _read(fields, name, dict)


def read_list(fields: dict[str, Any], name: str, *, most: int) -> list[Any]:
    """Return the list in field ``name``, of at most ``most`` items."""
    value = _read(fields, name, list)
    if len(value) > most:
        raise ProtocolError(f"field {name!r} may have {most} items, it has {len(value)}")
    return value


def _read(fields: dict[str, Any], name: str, kind: type[T]) -> T:
    try:
        value = fields[name]
    except KeyError:
        raise ProtocolError(f"field {name!r} is missing") from None
    if not isinstance(value, kind):
        raise ProtocolError(f"field {name!r} must be {kind.__name__}, it is {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
