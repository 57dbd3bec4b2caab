"""A word in shared memory that goes to another process and back: the floor that the machine sets under every call.

Both ends poll; nobody sleeps and nobody calls the system. What it takes is two transfers of a cache line in each
direction, which differs tenfold with where the two processors lie: on one chip with one cache, or on two.
"""

from libc.stdint cimport uint64_t

from fastref._core cimport fr_load_acquire, fr_pause, fr_store_release

from fastref.errors import FastrefError

__all__ = ["Line", "LINE_BYTES"]

LINE_BYTES = 128

cdef enum:
    ANSWER = 8              # words from the question to the answer: a cache line of its own for each
    MOST_LOOKS = 1 << 28    # about ten seconds

cdef uint64_t END = 0xFFFFFFFFFFFFFFFF


cdef class Line:
    """Two words, one for each direction.

    Parameters
    ----------
    memory : writable buffer
        ``LINE_BYTES`` zeroed bytes that both processes have mapped.
    """

    cdef uint64_t* words
    cdef uint64_t asked
    cdef object _memory

    def __cinit__(self, memory):
        cdef unsigned char[::1] room = memory
        if room.shape[0] < LINE_BYTES:
            raise FastrefError(f"two cache lines in {room.shape[0]} bytes")
        self._memory = memoryview(memory)
        self.words = <uint64_t*>&room[0]

    def round_trip(self) -> None:
        """Write the next number and wait until it has come back.

        Raises
        ------
        FastrefError
            When nobody answers.
        """
        cdef uint64_t looks = 0
        self.asked += 1
        fr_store_release(&self.words[0], self.asked)  # SYNC: pairs with the other end's acquire in echo
        while fr_load_acquire(&self.words[ANSWER]) != self.asked:  # SYNC: pairs with the store in echo
            fr_pause()
            looks += 1
            if looks == MOST_LOOKS:
                raise FastrefError("the process at the other end of the line is gone")

    def end(self) -> None:
        """Have the other end return from ``echo``."""
        fr_store_release(&self.words[0], END)

    def echo(self) -> None:
        """Send every number back until the other end says ``end``, polling all the time."""
        cdef uint64_t asked, answered = 0
        with nogil:
            while answered != END:
                asked = fr_load_acquire(&self.words[0])  # SYNC: pairs with the store in round_trip
                if asked != answered:
                    answered = asked
                    fr_store_release(&self.words[ANSWER], answered)  # SYNC: pairs with the acquire in round_trip
                else:
                    fr_pause()
