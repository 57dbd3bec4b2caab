"""Layout of a frame: a fixed header, the references it carries, then the payload."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastref._core cimport fr_fork


cdef enum:
    PYTHON_CALL = 1
    PYTHON_RET = 2
    PYTHON_REMOTE_CALL = 3
    RREF_FETCH_CALL = 4
    RREF_USER_DELETE = 5
    RREF_FORK_REQUEST = 6
    RREF_FORK_ACCEPT = 7
    RREF_CHILD_ACCEPT = 8
    GRANT = 9
    CREDIT_REQUEST = 10
    INTERN = 11
    DRAIN_ASK = 12
    DRAIN_DONE = 13
    IDLE_REPORT = 14
    GREETING = 15
    LEAVING = 16
    FAREWELL = 17
    SETTLED = 18
    DELETES_ASK = 19
    DELETES_DONE = 20
    CLEANUP_AUTOGRAD_CONTEXT_REQ = 21

    FLAG_PICKLED = 1     # the payload is a pickle with its buffers, not the fast encoding
    FLAG_BLOCK = 2       # the payload lies in the sender's arena; the frame carries a Block
    FLAG_ERROR = 4       # the answer is an exception
    FLAG_METHOD = 8      # the callable is a method of the first reference
    FLAG_PLAIN = 16      # the payload is in the encoding of strict jobs, of which the fast one is a part
    FLAG_FORKS_IN_BLOCK = 64  # the references lie in the block, before the payload
    FLAG_PUBLISHED = 128 # the answer to a fetch: the value can be read without its owner now; there is no payload
    FLAG_FORWARDED = 256 # tensors of the payload lie in memory of others; it is read before the cursor moves
    FLAG_CONTEXT = 512   # an autograd context goes along: its id and the number of the tensors' link lie before the payload
    FLAG_GRADIENTS = 1024  # of a published value: a tensor in it wants gradients, so who is in a context asks the owner
    FLAG_LOCAL = 32      # never on the wire: the answer lies in this process's own memory

    NO_SLOT = 0xFFFF


cdef extern from *:
    """
    struct fr_frame {               /* 40 bytes */
        uint16_t kind, flags, references, slot;
        uint64_t call;              /* call number of the caller, or what the kind says */
        int64_t deadline_ns;        /* CLOCK_MONOTONIC; 0: none */
        uint32_t callable;          /* interned number; 0: in the payload. Of a method or a fetch: a hash of what and whose */
        uint32_t payload;           /* bytes of it */
        uint32_t forks_size;        /* bytes of the references that follow the header */
        uint32_t block_forks;       /* bytes of the references that lie in the block instead */
    };
    struct fr_block {               /* 24 bytes */
        uint64_t offset, size;
        uint32_t index, generation; /* the block's entry in its owner's table, for who leases it; or NO_ENTRY */
    };
    """
    struct fr_frame:
        uint16_t kind
        uint16_t flags
        uint16_t references
        uint16_t slot
        uint64_t call
        int64_t deadline_ns
        uint32_t callable
        uint32_t payload
        uint32_t forks_size
        uint32_t block_forks
    struct fr_block:
        uint64_t offset
        uint64_t size
        uint32_t index
        uint32_t generation


cdef struct FrameView:
    # A frame that was checked: every pointer and length lies inside the bytes it came in.
    fr_frame head
    const char* forks
    const char* payload
    uint64_t payload_size


cdef int parse_frame(const char* data, uint64_t size, FrameView* view) noexcept nogil
cdef const char* next_fork(const char* forks, const char* end, fr_fork* fork) noexcept nogil
