"""The proxy of a reference under torch's module name."""

from fastref.rref import RRefProxy

__all__ = ["RRefProxy"]
