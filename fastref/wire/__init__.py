"""Values on the wire: message kinds and the layout of a frame."""

from fastref.wire.kinds import Kind

__all__ = ["Kind"]
