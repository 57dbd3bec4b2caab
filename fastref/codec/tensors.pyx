"""Plain CPU tensors in the fast encoding, made and read through DLPack.

Plain: exactly ``torch.Tensor`` or ``torch.nn.Parameter``, on the CPU, strided, of a dtype that DLPack knows, neither
conjugated nor negated lazily, and a parameter without attributes. All others go through pickle.

What travels is the memory from the first to the last element, with the strides, in one copy; of a large tensor with
wide gaps the elements alone do, gathered in the same single copy, and arrive without gaps.
Source of the structures: the DLPack specification, https://dmlc.github.io/dlpack, unversioned capsules.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t, uintptr_t
from libc.string cimport memcpy

import torch

from fastref.carriers.borrow cimport LEASE_FROM, Lease, Place, drop_lease, fr_lease
from fastref.carriers.warm cimport give_memory, take_memory
from fastref.codec.payload cimport Decoder, Encoder, fr_gather
from fastref.nogc cimport nogc_pause, nogc_resume
from fastref.codec.sharing import shared_blocks_by_address
from fastref.errors import ProtocolError

__all__ = ["StorageView"]

cdef extern from "Python.h":
    PyTypeObject* Py_TYPE(object)

cdef extern from "fr_gather.h" nogil:
    uint64_t fr_gather_plan(fr_gather*, uint32_t, int, const int64_t*, const int64_t*, int64_t*)
    char* fr_gather_copy(const fr_gather*, uint32_t, char*, const char*)

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    struct fr_dl_device { int32_t device_type, device_id; };
    struct fr_dl_type { uint8_t code, bits; uint16_t lanes; };
    struct fr_dl_tensor {
        void *data; struct fr_dl_device device; int32_t ndim; struct fr_dl_type dtype;
        int64_t *shape, *strides; uint64_t byte_offset;
    };
    struct fr_dl_managed { struct fr_dl_tensor tensor; void *context; void (*deleter)(struct fr_dl_managed *); };
    struct fr_dl_whole {            /* one allocation: this, the shape, and the data unless that is leased */
        struct fr_dl_managed managed;
        struct fr_lease *lease;
        uint64_t size;              /* of the allocation */
        int *freed;                 /* whoever is still making the tensor wants to know */
    };
    """
    struct fr_dl_device:
        int32_t device_type
        int32_t device_id
    struct fr_dl_type:
        uint8_t code
        uint8_t bits
        uint16_t lanes
    struct fr_dl_tensor:
        void* data
        fr_dl_device device
        int32_t ndim
        fr_dl_type dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    struct fr_dl_managed:
        fr_dl_tensor tensor
        void* context
        void (*deleter)(fr_dl_managed*)
    struct fr_dl_whole:
        fr_dl_managed managed
        fr_lease* lease
        uint64_t size
        int* freed

cdef extern from "fr_addresses.h" nogil:
    int fr_address_add(void*)
    void fr_address_remove(void*)
    bint fr_address_has(void*)
    void fr_addresses_watch_forks()

fr_addresses_watch_forks()

cdef enum:
    CPU = 1
    MOST_DIMENSIONS = 16
    SEGMENT_FROM = 2048     # smaller tensors are copied into the stream at once
    RELEASE_FROM = 65536    # larger ones are copied without the interpreter lock
    KEEPS_GAPS_UNTIL = 16384  # bytes that travel with all gaps between them; programs for torch look at strides
    ROOM_FOR_HEADER = 512   # what lies before the data in one allocation
    WANTS_GRADIENT = 1      # flags of the header
    IS_PARAMETER = 2
    HAS_STRIDES = 4
    IS_LINKED = 8           # it wants a gradient, and that goes back to the sender's tensor
    ALL_FLAGS = 15

cdef uint64_t MOST_ELEMENTS = <uint64_t>1 << 48

cdef struct TensorHeader:
    # Then come the sizes of the dimensions, the strides if the flags say so, and the data.
    uint8_t code
    uint8_t bits
    uint8_t ndim
    uint8_t flags
    uint64_t size

cdef object strided = torch.strided
cdef object to_dlpack = torch.utils.dlpack.to_dlpack
cdef object from_dlpack = torch._C._from_dlpack
cdef object make_subclass = torch.Tensor._make_subclass
cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
cdef PyObject* tensor_type = <PyObject*>Tensor
cdef PyObject* parameter_type = <PyObject*>Parameter
cdef object shared_memory = shared_blocks_by_address.data  # the dict itself, to be asked at once whether it is empty
cdef tuple whole_bytes = (torch.uint8, torch.int8)  # DLPack takes those of 1 to 7 bits for these


cdef int _last_code():
    """The last of DLPack's kinds of numbers that this torch takes back: bool, or the narrow floats behind it."""
    try:
        from_dlpack(to_dlpack(torch.empty(1, dtype=torch.float8_e8m0fnu)))
    except (AttributeError, BufferError, RuntimeError):
        return 6
    return 14

cdef unsigned LAST_CODE = _last_code()


cdef bint _is_carried(unsigned code, unsigned bits, int ndim) noexcept nogil:
    return 8 <= bits and not bits & 7 and code <= LAST_CODE and 0 <= ndim <= MOST_DIMENSIONS


cdef bint is_plain_tensor(object value) noexcept:
    return <PyObject*>Py_TYPE(value) == tensor_type or <PyObject*>Py_TYPE(value) == parameter_type


cdef int write_tensor(Encoder encoder, object tensor) except -1:
    """Append a tensor; False when it is not plain, or shares memory with one that was met."""
    cdef fr_dl_managed* managed
    cdef fr_dl_tensor* t
    cdef TensorHeader header
    cdef int64_t[MOST_DIMENSIONS] dense
    cdef int64_t* strides
    cdef uint64_t elements = 1, extent = 1, distinct = 1, item
    cdef fr_gather* plan = NULL
    cdef const char* data
    cdef char* at
    cdef Place place
    cdef bint is_forwarded
    cdef int i
    if tensor.layout is not strided or not tensor.is_cpu or tensor.is_neg() or tensor.is_conj():
        return False
    if shared_memory and tensor.untyped_storage().data_ptr() in shared_memory:
        return False
    header.flags = 0
    if tensor.requires_grad:
        encoder.gradients = True
        header.flags = WANTS_GRADIENT if encoder.linked is None else IS_LINKED
    if <PyObject*>Py_TYPE(tensor) == parameter_type:
        if tensor.__dict__:
            return False
        header.flags |= IS_PARAMETER
    try:
        capsule = to_dlpack(tensor)
    except (RuntimeError, BufferError):  # a dtype that DLPack does not know, a quantized tensor
        return False
    managed = <fr_dl_managed*>PyCapsule_GetPointer(capsule, "dltensor")
    t = &managed.tensor
    if t.device.device_type != CPU or t.dtype.lanes != 1 or not _is_carried(t.dtype.code, t.dtype.bits, t.ndim):
        return False
    if t.dtype.bits == 8 and t.dtype.code < 2 and tensor.dtype not in whole_bytes:
        return False
    item = t.dtype.bits // 8
    data = <char*>t.data + t.byte_offset
    for i in range(t.ndim):
        elements *= t.shape[i]
    strides = t.strides
    if tensor.is_contiguous():
        extent = elements
    else:  # of at least one element
        header.flags |= HAS_STRIDES
        for i in range(t.ndim):
            extent += (t.shape[i] - 1) * strides[i]
            if strides[i]:
                distinct *= t.shape[i]
        if extent * item > KEEPS_GAPS_UNTIL and extent * 2 > distinct * 3:
            kept = PyBytes_FromStringAndSize(NULL, sizeof(fr_gather))
            plan = <fr_gather*>PyBytes_AS_STRING(kept)
            fr_gather_plan(plan, item, t.ndim, t.shape, strides, &dense[0])
            strides = &dense[0]
    if not (encoder.is_apart(data, extent * item) if extent else encoder.first_meeting(tensor)):
        return False
    if plan != NULL:
        extent = distinct
        capsule = (capsule, kept)
    header.code, header.bits, header.ndim = t.dtype.code, t.dtype.bits, t.ndim
    header.size = extent * item
    is_forwarded = header.size >= LEASE_FROM and plan == NULL and encoder.arenas is not None \
        and encoder.forward(data, header.size, &place)
    at = encoder.grow(1 + sizeof(TensorHeader) + t.ndim * (16 if header.flags & HAS_STRIDES else 8))
    at[0] = c'Y' if is_forwarded else c'X'
    memcpy(at + 1, &header, sizeof(TensorHeader))
    memcpy(at + 1 + sizeof(TensorHeader), t.shape, t.ndim * 8)
    if header.flags & HAS_STRIDES:
        memcpy(at + 1 + sizeof(TensorHeader) + t.ndim * 8, strides, t.ndim * 8)
    if is_forwarded:
        encoder.raw(&place, sizeof(Place))
        encoder.kept.append(capsule)  # our lease lasts until the block is pinned for the message
    elif header.size >= SEGMENT_FROM:
        encoder.segment(data, header.size, plan, True, capsule)
    elif plan != NULL:
        fr_gather_copy(plan, 0, encoder.grow(header.size), data)
    elif header.size:
        encoder.raw(data, header.size)
    if header.flags & IS_LINKED:
        encoder.linked.append(tensor)
    return True


cdef void release(fr_dl_managed* managed) noexcept nogil:
    """The tensor is gone; any thread, with or without the interpreter lock."""
    cdef fr_dl_whole* whole = <fr_dl_whole*>managed
    if whole.freed != NULL:
        whole.freed[0] = 1
    fr_address_remove(whole.managed.tensor.data)  # before somebody else can have it
    if whole.lease != NULL:
        drop_lease(whole.lease)
    give_memory(whole, whole.size)


cdef bint is_made_here(uint64_t address) noexcept nogil:
    """Whether a received tensor begins there: nothing but its storage uses that memory."""
    return fr_address_has(<void*>address)


cdef object read_tensor(Decoder decoder, bint is_forwarded):
    """Make a tensor from the next bytes: of its own memory, or a large one where it lies, if that is leased.

    ``is_forwarded``: it lies in a block of another worker than the sender.
    """
    cdef Place place
    cdef Lease lease = decoder.lease
    cdef TensorHeader header
    cdef int64_t[MOST_DIMENSIONS] shape, strides
    cdef uint64_t elements = 1, span = 1, extent, size
    cdef int freed = 0
    cdef fr_dl_whole* whole
    cdef fr_dl_managed* managed
    cdef const char* data = NULL
    cdef bint leased = False
    cdef int64_t* sizes
    cdef int i
    memcpy(&header, decoder.take(sizeof(TensorHeader)), sizeof(TensorHeader))
    if not _is_carried(header.code, header.bits, header.ndim) or header.flags & ~ALL_FLAGS \
            or (header.flags & IS_LINKED and (decoder.linked is None or header.flags & WANTS_GRADIENT)):
        raise ProtocolError(f"a tensor of {header.ndim} dimensions and {header.bits} bits of kind {header.code}, "
                            f"flags {header.flags}")
    memcpy(&shape[0], decoder.take(header.ndim * 8), header.ndim * 8)
    for i in range(header.ndim):
        if shape[i] < 0 or (shape[i] and span > MOST_ELEMENTS // <uint64_t>shape[i]):
            raise ProtocolError(f"a tensor with a dimension of {shape[i]}")
        span *= shape[i] if shape[i] else 1  # zeros apart: strides are made of the others all the same
        elements *= shape[i]
    extent = elements
    if header.flags & HAS_STRIDES:
        memcpy(&strides[0], decoder.take(header.ndim * 8), header.ndim * 8)
        extent = 1
        for i in range(header.ndim):
            if strides[i] < 0 or not shape[i] or \
                    (strides[i] and <uint64_t>(shape[i] - 1) > MOST_ELEMENTS // <uint64_t>strides[i]):
                raise ProtocolError(f"a tensor with a stride of {strides[i]} over {shape[i]} elements")
            extent += (shape[i] - 1) * strides[i]
    if extent * (header.bits // 8) != header.size:
        raise ProtocolError(f"a tensor over {extent} elements of {header.bits} bits in {header.size} bytes")
    if is_forwarded:
        memcpy(&place, decoder.take(sizeof(Place)), sizeof(Place))
        lease = decoder.lease_of(&place)
        if lease is not None:
            if place.inner > lease.size_bytes or header.size > lease.size_bytes - place.inner:
                raise ProtocolError(f"a tensor of {header.size} bytes at {place.inner} of a block of {lease.size_bytes}")
            data = lease.start + place.inner
    else:
        data = decoder.aligned(header.size) if header.size >= SEGMENT_FROM else decoder.take(header.size)
    leased = lease is not None and header.size >= LEASE_FROM
    size = ROOM_FOR_HEADER + (0 if leased else header.size)
    whole = <fr_dl_whole*>take_memory(size)
    if whole == NULL:
        raise MemoryError(f"no memory for a tensor of {header.size} bytes")
    managed = &whole.managed
    sizes = <int64_t*>(whole + 1)
    memcpy(sizes, &shape[0], header.ndim * 8)
    if header.flags & HAS_STRIDES:
        memcpy(sizes + header.ndim, &strides[0], header.ndim * 8)
    managed.tensor.device.device_type = CPU
    managed.tensor.device.device_id = 0
    managed.tensor.ndim = header.ndim
    managed.tensor.dtype.code, managed.tensor.dtype.bits, managed.tensor.dtype.lanes = header.code, header.bits, 1
    managed.tensor.shape = sizes
    managed.tensor.strides = sizes + header.ndim if header.flags & HAS_STRIDES else NULL
    managed.tensor.byte_offset = 0
    managed.context = NULL
    managed.deleter = release
    whole.size, whole.freed = size, &freed
    whole.lease = NULL
    if leased:
        managed.tensor.data = <void*>data
        whole.lease = lease.share()
    else:
        managed.tensor.data = <char*>whole + ROOM_FOR_HEADER
        if is_forwarded:
            try:
                decoder.arena_of(&place).copy_forwarded(&place, header.size, <char*>managed.tensor.data)
            except BaseException:
                give_memory(whole, size)
                raise
        elif header.size > RELEASE_FROM:
            depth = nogc_pause()
            with nogil:
                memcpy(managed.tensor.data, data, header.size)
            nogc_resume(depth)
        else:
            memcpy(managed.tensor.data, data, header.size)
    fr_address_add(managed.tensor.data)
    try:
        tensor = from_dlpack(PyCapsule_New(managed, "dltensor", NULL))
    except (BufferError, RuntimeError) as error:
        if not freed:  # refused before the memory was taken over
            release(managed)
        raise ProtocolError(f"a tensor of {header.bits} bits of kind {header.code}: {error}") from error
    whole.freed = NULL
    try:
        if header.flags & IS_PARAMETER:
            tensor = make_subclass(Parameter, tensor, bool(header.flags & WANTS_GRADIENT))
        elif header.flags & (WANTS_GRADIENT | IS_LINKED):
            tensor.requires_grad_()
        if header.flags & IS_LINKED:
            decoder.linked.append(tensor.requires_grad_(False))
        return tensor
    except RuntimeError as error:  # whole numbers have no gradients
        raise ProtocolError(f"a tensor that cannot want a gradient does: {error}") from error


@cython.no_gc
cdef class StorageView:
    """The bytes of a storage of host memory, as a buffer.

    Parameters
    ----------
    storage : torch.UntypedStorage
    """

    cdef object _storage
    cdef void* _start
    cdef Py_ssize_t _size_bytes

    def __init__(self, storage):
        self._storage = storage
        self._start, self._size_bytes = <void*><uintptr_t>storage.data_ptr(), storage.nbytes()

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self._start, self._size_bytes, False, flags)
