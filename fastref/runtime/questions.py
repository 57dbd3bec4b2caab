"""What a user may ask the owner of a value about it; each waits until the value is there."""

from __future__ import annotations

from fastref.rref import RRef

__all__ = ["_is_there", "_rref_typeof_on_owner"]


def _is_there(rref: RRef) -> None:
    """Return when the value is there; raise what kept it from being made."""
    rref.local_value()


def _rref_typeof_on_owner(rref: RRef) -> type:
    """Return the value's type. The name is torch's: profiles show it."""
    return type(rref.local_value())
