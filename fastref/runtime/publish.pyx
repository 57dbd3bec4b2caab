"""Values that users read without their owner: what may be published, when, and when no more.

Three kinds are published. A value that nobody can ever change, as soon as it is there. A value that nobody but its
reference can reach, when it is fetched for the first time, and until code of the owner can reach it: the copy is
withdrawn before. And what the program publishes itself, until it publishes the next version.

What holders read is a copy in the arena that no code of the owner ever sees. It has a table entry of its own, which who
reads it holds: a reader that has begun keeps what it reads, whatever is withdrawn or published meanwhile.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from fastref._core cimport (FR_FAILPOINT, FR_FORM_BLOCK, FR_FORM_INLINE, FR_INLINE_VALUE, failpoints,
                            fr_descriptor_read, fr_failpoints_here, fr_published)
from fastref.codec.payload cimport Encoder
from fastref.codec.publishable cimport IMMUTABLE, UNREACHABLE, value_publishability
from fastref.codec.stream cimport encode_value
from fastref.rref cimport OwnedValue, RRef
from fastref.wire.frame cimport FLAG_GRADIENTS

from fastref.errors import ResourceError, UsageError

__all__ = ["Publisher"]

fr_failpoints_here = failpoints()

cdef enum:
    LARGEST_IMMUTABLE = 1 << 20     # copied while the value is made, whether anybody will fetch it or not


cdef class Publisher(Post):
    """The part of a runtime that lets its values be read."""

    def __cinit__(self):
        self.copies = {}

    cdef int publish(self, OwnedValue owned, uint32_t index) except -1:
        """Let holders read an immutable value without asking; of others say only that it is there."""
        cdef Encoder body
        cdef uint64_t offset
        if value_publishability(<PyObject*>owned.value) != IMMUTABLE:
            self.table.set_state(index, "ready")
            return 0
        body = self.encoder()
        try:
            if not encode_value(body, owned.value, 0) or body.total() > LARGEST_IMMUTABLE:
                self.table.set_state(index, "ready")
                return 0
            data = PyBytes_FromStringAndSize(NULL, body.total())
            body.copy_to(PyBytes_AS_STRING(data))
        finally:
            self.encoder_done(body)
        if not self.table.publish_inline(index, data):
            try:
                offset = self.arena.lend(len(data))
            except ResourceError:
                self.table.set_state(index, "ready")
                return 0
            self.arena.fill(offset, data)
            self.arena.keep_for(offset, index)
            self.table.publish_block(index, offset, len(data))
        self.values_published += 1
        return 0

    cdef bint offer(self, OwnedValue owned, uint32_t index) except -1:
        """A holder asks for a value: publish it if nobody can reach it; True when it can be read now."""
        cdef Encoder body
        cdef int kind
        if owned.published:
            return True
        if owned.publishing:
            return False
        kind = value_publishability(<PyObject*>owned.value)
        if kind == IMMUTABLE:
            owned.lasting = True
        elif kind != UNREACHABLE or owned.exposed:
            return False
        owned.publishing = True
        body = self.encoder()
        try:
            if not encode_value(body, owned.value, 0):
                return False  # it takes pickle
            # Copies of values leave room for calls, and go where everybody knows the memory already.
            if self.arena.bytes_lent + body.total() > self.arena.limit // 2 or self.arena.unannounced:
                return False
            return self._show(owned, index, body, 0, 0)
        except ResourceError:
            return False
        finally:
            owned.publishing = False
            self.encoder_done(body)

    cdef int expose(self, OwnedValue owned) except -1:
        """Code of the program will reach a value: from here on nobody begins to read a copy of it."""
        owned.exposed = True  # first: a copy that is being made will not be shown
        if owned.published and not owned.frozen and not owned.lasting:
            self.withdraw(owned)
        return 0

    cdef int withdraw(self, OwnedValue owned) except -1:
        """Have holders ask again, and let go of the copy.

        The descriptor first. Whatever makes an object may collect garbage, and so run code of the program, to which the
        value counts as exposed already.
        """
        cdef int64_t offset = owned.block
        self.table.withdraw(owned.index)
        owned.block = -1
        owned.published = owned.frozen = False
        self.copies.pop(owned.index, None)
        self.values_withdrawn += 1
        FR_FAILPOINT("publish.withdrawn")
        if offset >= 0:
            self.arena.give_back(offset)
        return 0

    def withdraw_copies(self) -> None:
        """Withdraw what was not published by the program: the arena is full."""
        for owned in list(self.copies.values()):
            if (<OwnedValue>owned).published and not (<OwnedValue>owned).frozen:
                self.withdraw(owned)

    def forget_copy(self, owned: OwnedValue) -> None:
        """Let go of the copy of a value that nobody holds any more."""
        offset, owned.block = owned.block, -1
        if owned.published:
            owned.published = owned.frozen = False
            self.copies.pop(owned.index, None)
        if offset >= 0:
            self.arena.give_back(offset)

    cdef int freeze(self, RRef rref, bint publish) except -1:
        """Publish the present version of a value, or withdraw what was published."""
        cdef Encoder body
        cdef OwnedValue owned = rref.owned
        cdef uint64_t turn
        cdef int flags
        value = self.local(rref, -1.0)
        owned.turns += 1
        turn = owned.turns
        if not publish:
            owned.shown_turn = turn
            if owned.published:
                self.withdraw(owned)
            return 0
        if rref.holder is None:
            self.share(rref, self.deadline(-1.0))
        body = self.encoder()
        try:
            flags = self.encode_any(body, value, False, "value")
            if body.references or body.blocks:
                raise UsageError(f"{rref!r} cannot be published: there are references in its value, or shared memory")
            if body.gradients:
                flags |= FLAG_GRADIENTS
            self._show(owned, rref.fork.index, body, flags, turn)
        finally:
            self.encoder_done(body)
        return 0

    cdef Encoder frozen_copy(self, OwnedValue owned, int* flags):
        """What the program has published, for a holder that cannot read it where it lies; None when it no longer is."""
        cdef Encoder body = self.encoder()
        cdef fr_published seen
        # No object is made from here to the end: no code of the program runs, and the block stays.
        if not owned.frozen or not fr_descriptor_read(&self.table.at.descriptors[owned.index], &seen):
            self.encoder_done(body)
            return None
        flags[0] = seen.flags & ~FLAG_GRADIENTS
        body.raw(<const char*>seen.words if seen.form == FR_FORM_INLINE else self.arena.base + seen.block.offset, seen.size)
        return body

    cdef int _show(self, OwnedValue owned, uint32_t index, Encoder body, int flags, uint64_t turn) except -1:
        """Copy an encoded value and have holders read the copy; False when the value has become reachable, or gone, meanwhile.

        ``turn``: the program wants it, whoever can reach the value, unless what it has begun later is done already; 0:
        the program does not know.
        """
        cdef fr_published now
        cdef int64_t offset = -1, before
        cdef bint frozen = turn != 0, late
        memset(&now, 0, sizeof(fr_published))
        now.form, now.flags, now.size = FR_FORM_INLINE, flags, body.total()
        if now.size <= FR_INLINE_VALUE:
            body.copy_to(<char*>now.words)
        else:
            offset = self.lend_to_all(now.size)
            try:
                with nogil:
                    body.copy_to(self.arena.base + offset)
                now.form, now.block.offset = FR_FORM_BLOCK, offset
                now.block.index, now.block.generation = self.open_entry()
                self.arena.pin(offset, now.block.index)
                self.table.set_state(now.block.index, "ready")  # nothing will be made for it
            except BaseException:
                self.arena.give_back(offset)
                raise
            FR_FAILPOINT("publish.copied")
        # From here to the end under one hold of the interpreter lock: `expose` comes before or after.
        late = turn < owned.shown_turn if frozen else owned.exposed and not owned.lasting
        if late or self.owned[index] is not owned:
            if offset >= 0:
                self.arena.give_back(offset)
            return False
        before, owned.block = owned.block, offset
        owned.published, owned.frozen, owned.index = True, frozen, index
        owned.gradients = (flags & FLAG_GRADIENTS) != 0
        owned.shown_turn = max(owned.shown_turn, turn)
        self.table.publish(index, &now)
        self.values_published += 1
        if frozen or offset < 0:
            self.copies.pop(index, None)
        else:
            self.copies[index] = owned
        if before >= 0:
            self.arena.give_back(before)
        return True
