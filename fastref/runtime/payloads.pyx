"""Values in frames: how they are written, and read again."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from fastref.carriers.borrow cimport LEASE_FROM, Lease
from fastref.codec.payload cimport Carried, Decoder, Encoder
from fastref.codec.plain cimport decode_plain, encode_plain
from fastref.codec.stream cimport decode_value, encode_value
from fastref.nogc cimport nogc_pause, nogc_resume
from fastref.rref cimport Wiring
from fastref.runtime.peer cimport Peer
from fastref.wire.frame cimport FLAG_CONTEXT, FLAG_PICKLED, FLAG_PLAIN

from fastref.carriers.warm import WarmBuffer
from fastref.codec.failures import decode_failure, decode_plain_failure, encode_failure, encode_plain_failure
from fastref.codec.pickling import dumps, loads
from fastref.errors import ProtocolError, StrictModeError
from fastref.segments.shared import shared_blocks

import torch

__all__ = ["Payloads"]

cdef extern from "Python.h":
    object PyByteArray_FromStringAndSize(const char*, Py_ssize_t)

cdef enum:
    COPIED_WARM_FROM = 65536  # smaller buffers the allocator keeps warm by itself

cdef object grad_is_enabled = torch.is_grad_enabled


cdef class Payloads(Wiring):
    """What a runtime sends and takes of values: the fast encoding, pickles, and the links of autograd contexts."""

    def __init__(self, info, strict: bool):
        self.info, self.strict = info, strict
        self.encode_failure = encode_plain_failure if strict else encode_failure
        self.decode_failure = decode_plain_failure if strict else decode_failure
        self.arenas = []
        self._encoders = []

    cdef Encoder encoder(self):
        """An empty encoder; ``encoder_done`` takes it back."""
        try:
            return self._encoders.pop()
        except IndexError:
            return Encoder()

    cdef void encoder_done(self, Encoder encoder) noexcept:
        if encoder.lent:
            return
        encoder.reset()
        if len(self._encoders) < 16:
            self._encoders.append(encoder)

    # ---- writing

    cdef int encode_any(self, Encoder body, object value, bint shares_main, str what) except -1:
        """Append a value; returns the flags that say how. ``what`` it is, as for ``encode_plain``."""
        cdef uint64_t size = body.size
        cdef unsigned segments = body.segment_count
        cdef Py_ssize_t references = len(body.references), forwarded = len(body.forwarded)
        if encode_value(body, value, 0):
            return 0
        while body.segment_count > segments:  # forget what was written of this value
            body.segment_count -= 1
            body.segment_bytes -= body.segments[body.segment_count].size
        body.size = size
        del body.references[references:]
        del body.forwarded[forwarded:]
        if body.linked is not None:
            del body.linked[:]
        if self.strict:
            encode_plain(body, value, what)
            return FLAG_PLAIN
        self.encode_pickled(body, value, shares_main)
        return FLAG_PICKLED

    cdef int encode_pickled(self, Encoder body, object value, bint shares_main) except -1:
        """Append a pickle: number of buffers, size of the pickle, sizes of the buffers, the pickle, the buffers."""
        cdef uint64_t number
        cdef const unsigned char[::1] bytes_of
        data, buffers = dumps(value, body.references, shares_main, body.blocks, body.linked)
        number = len(buffers)
        body.raw(&number, 8)
        number = len(data)
        body.raw(&number, 8)
        for buffer in buffers:
            number = buffer.nbytes
            body.raw(&number, 8)
        body.raw(<const char*>data, len(data))
        for buffer in buffers:
            if buffer.nbytes:
                bytes_of = buffer
                body.segment(<const char*>&bytes_of[0], buffer.nbytes, NULL, True, buffer)
        return 0

    # ---- reading

    cdef object decode_any(self, const char* payload, uint64_t size, int flags, list references, Lease lease):
        """Read what ``encode_any`` wrote; ``lease``: of the block that it lies in, if it has one."""
        cdef Decoder decoder = Decoder.__new__(Decoder)
        decoder.start = decoder.at = payload
        decoder.end = payload + size
        decoder.references, decoder.lease = references, lease
        return self._read(decoder, size, flags)

    cdef object decode_forwarded(self, const char* payload, uint64_t size, int flags, list references, Lease lease,
                                uint32_t site):
        """As ``decode_any``, of a payload of which parts lie in memory of others. The sender still holds them."""
        cdef Decoder decoder = Decoder.__new__(Decoder)
        decoder.start = decoder.at = payload
        decoder.end = payload + size
        decoder.references, decoder.lease, decoder.arenas, decoder.site = references, lease, self.arenas, site
        return self._read(decoder, size, flags)

    cdef object _read(self, Decoder decoder, uint64_t size, int flags):
        cdef Carried carried
        if not flags & FLAG_CONTEXT:
            return self._read_payload(decoder, size, flags)
        carried = Carried.__new__(Carried)
        memcpy(&carried.context, decoder.take(8), 8)
        memcpy(&carried.link, decoder.take(8), 8)
        carried.tensors = decoder.linked = []
        carried.value = self._read_payload(decoder, size, flags)
        return carried

    cdef object _read_payload(self, Decoder decoder, uint64_t size, int flags):
        cdef uint64_t count, length
        cdef const char* at
        cdef Lease lease = decoder.lease
        if not flags & (FLAG_PICKLED | FLAG_PLAIN):
            return decode_value(decoder, 0)
        if not flags & FLAG_PICKLED:
            return decode_plain(decoder)
        if self.strict:
            raise StrictModeError(f"{self.info} is strict and does not read {size} bytes of pickle: arguments, results and values "
                                  "must be plain data, or all workers of the job have strict=False")
        memcpy(&count, decoder.take(8), 8)
        memcpy(&length, decoder.take(8), 8)
        if count > size // 8:
            raise ProtocolError(f"a pickle with {count} buffers in {size} bytes")
        sizes = []
        for _ in range(count):
            sizes.append(_number(decoder))
        data = PyBytes_FromStringAndSize(decoder.take(length), length)
        whole = None if lease is None else memoryview(lease)
        buffers = []  # of one type, whatever their size
        for length in sizes:
            at = decoder.aligned(length) if length else NULL
            if lease is not None and length >= LEASE_FROM:
                buffers.append(whole[at - lease.start:at - lease.start + length])
            else:
                buffers.append(_copied(at, length))
        return loads(data, buffers, decoder.references, self.claim_block, decoder.linked)

    def claim_block(self, number: int):
        """The block for sharing that a message names."""
        return shared_blocks[number]

    # ---- autograd contexts

    cdef uint64_t begin_links(self, Encoder body, uint64_t context, Peer peer, bint is_call) except? 0xFFFFFFFFFFFFFFFF:
        """Have an empty ``body`` begin with the context that it goes along with; 0 when that has been let go of."""
        cdef uint64_t[2] prefix
        if self.autograd is None or not self.autograd.goes_to(context, peer.rank if is_call else None):
            return 0
        prefix[0], prefix[1] = context, 0
        body.raw(prefix, sizeof(prefix))
        if grad_is_enabled():
            body.linked = []
        return context

    cdef int end_links(self, Encoder body, uint64_t context, Peer peer) except -1:
        """All is in ``body``: make its tensors that want gradients one link, and say which."""
        cdef uint64_t link
        if body.linked:
            link = self.autograd.send(context, peer.rank, body.linked)
            memcpy(body.data + 8, &link, 8)
        return 0

    cdef object unload(self, Carried carried, Peer peer):
        """The value that came with a context; its tensors are part of this worker's graph from here on."""
        if carried.tensors:
            if self.autograd is None or not carried.link:
                raise ProtocolError(f"worker {peer.info.name!r} sent linked tensors without a link")
            self.autograd.receive(carried.context, peer.rank, carried.link, carried.tensors)
        return carried.value


cdef object _copied(const char* start, uint64_t size):
    """A writable copy of a buffer; of a large one in memory that is warm."""
    cdef unsigned char[::1] room
    cdef int depth
    if size < COPIED_WARM_FROM:
        return memoryview(PyByteArray_FromStringAndSize(start, size))
    copy = memoryview(WarmBuffer(size))
    room = copy
    depth = nogc_pause()
    with nogil:
        memcpy(&room[0], start, size)
    nogc_resume(depth)
    return copy


cdef object _number(Decoder decoder):
    cdef uint64_t number
    memcpy(&number, decoder.take(8), 8)
    return number
