"""Plain CPU tensors in the fast encoding, made and read through DLPack.

Plain: exactly ``torch.Tensor``, on the CPU, strided, contiguous, no gradient. All others go through pickle.
Source of the structures: the DLPack specification, https://dmlc.github.io/dlpack, unversioned capsules.
"""

from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName
from libc.stdint cimport int32_t, int64_t, uint16_t, uint64_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memcpy

import torch

from fastref.carriers.borrow cimport LEASE_FROM, drop_lease, fr_lease
from fastref.codec.payload cimport Decoder, Encoder
from fastref.errors import ProtocolError

cdef extern from "Python.h":
    PyTypeObject* Py_TYPE(object)

cdef extern from "stdlib.h":
    int posix_memalign(void** out, size_t alignment, size_t size)

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
    LAST_CODE = 6           # later codes are narrow floats, which not every torch takes back
    SEGMENT_FROM = 2048     # smaller tensors are copied into the stream at once
    RELEASE_FROM = 65536    # larger ones are copied without the interpreter lock
    ROOM_FOR_HEADER = 512   # what lies before the data in one allocation

cdef uint64_t MOST_ELEMENTS = <uint64_t>1 << 48

cdef struct TensorHeader:
    uint8_t code
    uint8_t bits
    uint8_t ndim
    uint8_t unused
    uint64_t size

cdef object strided = torch.strided
cdef object to_dlpack = torch.utils.dlpack.to_dlpack
cdef object from_dlpack = torch._C._from_dlpack
cdef object Tensor = torch.Tensor
cdef PyObject* tensor_type = <PyObject*>Tensor


cdef bint is_plain_tensor(object value) noexcept:
    return <PyObject*>Py_TYPE(value) == tensor_type


cdef int write_tensor(Encoder encoder, object tensor) except -1:
    """Append a tensor; False when it is not plain."""
    cdef fr_dl_managed* managed
    cdef fr_dl_tensor* t
    cdef TensorHeader header
    cdef int64_t elements = 1
    cdef char* at
    cdef int i
    if tensor.requires_grad or tensor.layout is not strided or not tensor.is_cpu:
        return False
    if tensor.is_neg() or tensor.is_conj() or not tensor.is_contiguous():
        return False
    try:
        capsule = to_dlpack(tensor)
    except (RuntimeError, BufferError):  # a dtype that DLPack does not know, a quantized tensor
        return False
    managed = <fr_dl_managed*>PyCapsule_GetPointer(capsule, "dltensor")
    t = &managed.tensor
    if t.device.device_type != CPU or t.dtype.lanes != 1 or t.dtype.bits < 8 or t.dtype.bits & 7 or t.dtype.code > LAST_CODE or t.ndim > MOST_DIMENSIONS:
        return False
    for i in range(t.ndim):
        elements *= t.shape[i]
    header.code, header.bits, header.ndim, header.unused = t.dtype.code, t.dtype.bits, t.ndim, 0
    header.size = elements * (t.dtype.bits // 8)
    at = encoder.grow(1 + sizeof(TensorHeader) + t.ndim * 8)
    at[0] = c'X'
    memcpy(at + 1, &header, sizeof(TensorHeader))
    memcpy(at + 1 + sizeof(TensorHeader), t.shape, t.ndim * 8)
    if header.size >= SEGMENT_FROM:
        encoder.segment(<char*>t.data + t.byte_offset, header.size, capsule)
    elif header.size:
        encoder.raw(<char*>t.data + t.byte_offset, header.size)
    return True


cdef void release(fr_dl_managed* managed) noexcept nogil:
    """The tensor is gone; any thread, with or without the interpreter lock."""
    cdef fr_dl_whole* whole = <fr_dl_whole*>managed
    if whole.freed != NULL:
        whole.freed[0] = 1
    fr_address_remove(whole.managed.tensor.data)  # before somebody else can have it
    if whole.lease != NULL:
        drop_lease(whole.lease)
    free(whole)


cdef bint is_made_here(uint64_t address) noexcept nogil:
    """Whether a received tensor begins there: nothing but its storage uses that memory."""
    return fr_address_has(<void*>address)


cdef object read_tensor(Decoder decoder):
    """Make a tensor from the next bytes: of its own memory, or a large one where it lies, if that is leased."""
    cdef TensorHeader header
    cdef int64_t[MOST_DIMENSIONS] shape
    cdef uint64_t elements = 1, span = 1
    cdef int freed = 0
    cdef fr_dl_whole* whole
    cdef fr_dl_managed* managed
    cdef const char* data
    cdef bint leased = False
    cdef int64_t* sizes
    cdef int i
    memcpy(&header, decoder.take(sizeof(TensorHeader)), sizeof(TensorHeader))
    if header.ndim > MOST_DIMENSIONS or header.bits < 8 or header.bits & 7 or header.code > LAST_CODE:
        raise ProtocolError(f"a tensor of {header.ndim} dimensions and {header.bits} bits of kind {header.code}")
    memcpy(&shape[0], decoder.take(header.ndim * 8), header.ndim * 8)
    for i in range(header.ndim):
        if shape[i] < 0 or (shape[i] and span > MOST_ELEMENTS // <uint64_t>shape[i]):
            raise ProtocolError(f"a tensor with a dimension of {shape[i]}")
        span *= shape[i] if shape[i] else 1  # zeros apart: strides are made of the others all the same
        elements *= shape[i]
    if elements * (header.bits // 8) != header.size:
        raise ProtocolError(f"a tensor of {elements} elements of {header.bits} bits in {header.size} bytes")
    data = decoder.aligned(header.size) if header.size >= SEGMENT_FROM else decoder.take(header.size)
    leased = decoder.lease is not None and header.size >= LEASE_FROM
    if posix_memalign(<void**>&whole, 64, ROOM_FOR_HEADER + (0 if leased else header.size)):
        raise MemoryError(f"no memory for a tensor of {header.size} bytes")
    managed = &whole.managed
    sizes = <int64_t*>(whole + 1)
    memcpy(sizes, &shape[0], header.ndim * 8)
    managed.tensor.device.device_type = CPU
    managed.tensor.device.device_id = 0
    managed.tensor.ndim = header.ndim
    managed.tensor.dtype.code, managed.tensor.dtype.bits, managed.tensor.dtype.lanes = header.code, header.bits, 1
    managed.tensor.shape = sizes
    managed.tensor.strides = NULL
    managed.tensor.byte_offset = 0
    managed.context = NULL
    managed.deleter = release
    whole.freed = &freed
    whole.lease = NULL
    if leased:
        managed.tensor.data = <void*>data
        whole.lease = decoder.lease.share()
    else:
        managed.tensor.data = <char*>whole + ROOM_FOR_HEADER
        if header.size > RELEASE_FROM:
            with nogil:
                memcpy(managed.tensor.data, data, header.size)
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
    return tensor
