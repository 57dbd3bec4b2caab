"""Types of the compiled ``fastref.runtime.publish``."""

from fastref.rref import OwnedValue
from fastref.runtime.post import Post

__all__ = ["Publisher"]

class Publisher(Post):
    values_published: int
    values_withdrawn: int

    def withdraw_copies(self) -> None: ...
    def forget_copy(self, owned: OwnedValue) -> None: ...
