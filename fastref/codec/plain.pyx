"""The encoding of strict jobs, for values that the fast one cannot take; there is no pickle to fall back to.

Beyond the tags of the fast encoding: integers of any size, complex numbers, text with lone surrogates, sets, frozensets,
``OrderedDict`` with the ``_metadata`` of a ``state_dict()``, ``torch.Size``, dtypes, devices, ``WorkerInfo``, and
containers of any number. What is met again is a number, so that identity and cycles survive; tensors that share memory
arrive apart.

Encoder and decoder count alike what can be met again: lists, dicts and sets before their items, tuples and frozensets
behind them, and bytearrays, tensors, references and long texts and bytes.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastref.codec.payload cimport Decoder, Encoder
from fastref.codec.stream cimport decode_value, encode_value
from fastref.codec.tensors cimport is_plain_tensor, write_tensor
from fastref.rref cimport RRef

from collections import OrderedDict

import torch

from fastref.codec.sharing import shared_block_of
from fastref.errors import ProtocolError, StrictModeError, UsageError
from fastref.options import WorkerInfo

__all__ = ["decode", "encode"]

cdef enum:
    DEEPEST = 256           # nesting that the recursive functions follow
    REMEMBERED_FROM = 4096  # characters or bytes from which on text and bytes are written once

cdef dict _dtypes = {str(it): it for it in vars(torch).values() if isinstance(it, torch.dtype)}

SENT = "None, numbers, text, bytes, dense tensors, references, and lists, tuples, dicts and sets of those"


cdef class _Writer:
    cdef Encoder encoder
    cdef dict numbers       # id of what can be met again -> its number, and itself: the id must stay its own
    cdef uint32_t met       # how many there were
    cdef int keys           # how many keys we are inside of: tuples there are written at each meeting, for to hash one
                            # of which parts come again and again can take for ever
    cdef list path          # where we are
    cdef str what

    cdef int write(self, object value) except -1:
        cdef double[2] parts
        kind = type(value)
        if value is None or kind is bool or kind is float or kind is int:
            if not encode_value(self.encoder, value, 0):
                self.write_bytes(c'I', value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True))
            return 0
        known = self.numbers.get(id(value))
        if known is not None and not (self.keys and (kind is tuple or kind is frozenset)):
            return self.encoder.tag32(c'm', known[0])
        if len(self.path) > DEEPEST:
            self.refuse(f"a container more than {DEEPEST} deep, or one that is inside of itself,")
        if kind is str or kind is bytes:
            if not encode_value(self.encoder, value, 0):
                self.write_bytes(c'u', value.encode("utf-8", "surrogatepass"))
            if len(value) > REMEMBERED_FROM:
                self.remember(value)
        elif kind is bytearray or kind is RRef:
            if not encode_value(self.encoder, value, 0):
                self.refuse(f"a bytearray of {len(value)} bytes")
            self.remember(value)
        elif is_plain_tensor(value):
            self.write_tensor_of(value)
            self.remember(value)
        elif kind is tuple:
            self.write_items(c't', value)
            self.remember(value)
        elif kind is list:
            self.remember(value)
            self.write_items(c'l', list(value))  # as it is now: other threads may change it
        elif kind is dict:
            self.remember(value)
            self.write_pairs(c'd', list(value.items()))
        elif kind is set:
            self.remember(value)
            self.keys += 1
            self.write_items(c'S', list(value))
            self.keys -= 1
        elif kind is frozenset:
            self.keys += 1
            self.write_items(c'Z', list(value))
            self.keys -= 1
            self.remember(value)
        elif kind is OrderedDict and not vars(value).keys() - {"_metadata"}:
            self.remember(value)
            self.write_pairs(c'o', list(value.items()))
            self.write(vars(value).get("_metadata"))
        elif kind is complex:
            parts[0], parts[1] = value.real, value.imag
            self.encoder.grow(1)[0] = c'c'
            self.encoder.raw(&parts[0], sizeof(parts))
        elif kind is torch.Size:
            self.write_items(c'q', list(value))
        elif kind is torch.dtype:
            self.write_bytes(c'y', str(value).encode())
        elif kind is torch.device:
            self.write_bytes(c'v', str(value).encode())
        elif kind is WorkerInfo:
            self.encoder.grow(1)[0] = c'w'
            self.write(value.name)
            self.write(value.id)
        elif isinstance(value, torch.Tensor):
            self.refuse(f"a tensor of class {kind.__module__}.{kind.__qualname__}")
        elif isinstance(value, type):
            self.refuse(f"the class {value.__module__}.{value.__qualname__}")
        else:
            self.refuse(f"an object of class {kind.__module__}.{kind.__qualname__}")
        return 0

    cdef int remember(self, object value) except -1:
        self.numbers[id(value)] = self.met, value
        self.met += 1
        return 0

    cdef int write_bytes(self, char tag, bytes data) except -1:
        if len(data) > 0xFFFFFFFF:
            self.refuse(f"a value of {len(data)} bytes")
        self.encoder.tag32(tag, len(data))
        return self.encoder.raw(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef int write_items(self, char tag, object items) except -1:
        if len(items) > 0xFFFFFFFF:
            self.refuse(f"a container of {len(items)} items")
        self.encoder.tag32(tag, len(items))
        for number, item in enumerate(items):
            self.path.append(number)
            self.write(item)
            self.path.pop()
        return 0

    cdef int write_pairs(self, char tag, list pairs) except -1:
        if len(pairs) > 0xFFFFFFFF:
            self.refuse(f"a container of {len(pairs)} items")
        self.encoder.tag32(tag, len(pairs))
        for key, value in pairs:
            self.path.append((key, "itself"))
            self.keys += 1
            self.write(key)
            self.keys -= 1
            self.path.pop()
            self.path.append((key,))
            self.write(value)
            self.path.pop()
        return 0

    cdef int write_tensor_of(self, object tensor) except -1:
        if write_tensor(self.encoder, tensor):
            return 0
        if tensor.is_cpu and tensor.layout is torch.strided:
            if shared_block_of(tensor.untyped_storage()) is not None:
                self.refuse("a tensor in memory that several write (send tensor.clone())")
            plain = tensor.resolve_conj().resolve_neg()
            if write_tensor(self.encoder, plain):
                return 0
        self.refuse(f"a tensor of kind {tensor.layout}, {tensor.dtype}, on {tensor.device}")

    cdef object refuse(self, str found):
        raise StrictModeError(f"{_place(self.what, self.path)}: {found} is no plain data, and a strict job sends nothing else: "
                              f"{SENT}. Anything else stays where it is, and a reference to it can be sent.")


cdef str _place(str what, list path):
    """Say where in a call or a result something is."""
    cdef int arguments = 1 if what == "method" else 0     # where they are, behind the name of a method
    if what != "call" and what != "method":
        shown, inside = [f"the {what}"], path
    elif len(path) < 2:
        shown, inside = ["the arguments"], []
    elif path[0] == arguments:
        shown, inside = [f"argument {path[1] + 1}"], path[2:]
    else:
        shown, inside = [f"keyword argument {repr(path[1][0])[:80]}"], path[2:]
    for step in inside:
        if not isinstance(step, tuple):
            shown.append(f"item {step}")
        elif len(step) == 1:
            shown.append(f"key {repr(step[0])[:80]}")
        else:
            shown.append("a key")
    return ", ".join(shown)


cdef int encode_plain(Encoder encoder, object value, str what) except -1:
    """Append a value. ``what``: "call", when it is (args, kwargs), "method" with a name ahead, or the word for it.

    Raises
    ------
    StrictModeError
        Something in it is not plain; the message says what, and where.
    """
    cdef _Writer writer = _Writer.__new__(_Writer)
    writer.encoder, writer.what, writer.numbers, writer.path = encoder, what, {}, []
    encoder.plain = True
    return writer.write(value)


cdef object decode_plain(Decoder decoder):
    """Read what ``encode_plain`` wrote. Every length is checked against the bytes that are there."""
    cdef _Reader reader = _Reader.__new__(_Reader)
    reader.decoder, reader.met = decoder, []
    return reader.read(0)


cdef class _Reader:
    cdef Decoder decoder
    cdef list met
    cdef int keys           # as of _Writer

    cdef object read(self, int depth):
        cdef Decoder decoder = self.decoder
        cdef char tag = decoder.take(1)[0]
        cdef uint32_t size
        cdef double[2] parts
        if tag in (c'N', c'T', c'F', c'i', c'f', c's', c'b', c'B', c'a', c'A', c'R', c'X', c'Y'):
            decoder.at -= 1
            value = decode_value(decoder, 0)
            if tag in (c'a', c'A', c'R', c'X', c'Y') or (tag in (c's', c'b', c'B') and len(value) > REMEMBERED_FROM):
                self.met.append(value)
            return value
        if tag == c'c':
            memcpy(&parts[0], decoder.take(sizeof(parts)), sizeof(parts))
            return complex(parts[0], parts[1])
        if tag == c'w':
            name, rank = self.read(DEEPEST), self.read(DEEPEST)
            try:
                return WorkerInfo(name, rank)
            except (TypeError, UsageError) as error:
                raise ProtocolError(f"a payload with a worker that cannot be: {error}") from error
        size = decoder.number()
        if tag == c'm':
            if size >= <size_t>len(self.met):
                raise ProtocolError(f"a payload says that number {size} of {len(self.met)} comes again")
            value = self.met[size]
            if self.keys and isinstance(value, (tuple, frozenset)):
                raise ProtocolError("a payload with a key of which parts come again")
            return value
        if tag == c'I':
            return int.from_bytes(_bytes(decoder, size), "little", signed=True)
        if tag == c'u' or tag == c'y' or tag == c'v':
            return self.read_text(tag, _bytes(decoder, size))
        decoder.claimed += size  # each item takes a byte at least: all claims together fit in the payload
        if depth >= DEEPEST or decoder.claimed > <uint64_t>(decoder.end - decoder.start):
            raise ProtocolError(f"a payload claims a container of {size} in {decoder.end - decoder.at} bytes, {depth} deep")
        try:
            return self.read_container(tag, size, depth + 1)
        except (TypeError, OverflowError) as error:
            raise ProtocolError("a payload with a key that cannot be one, or a size that is not made of integers") from error

    cdef object read_container(self, char tag, uint32_t size, int depth):
        cdef uint32_t i
        cdef object found
        if tag == c'l':
            found = []
            self.met.append(found)
            for i in range(size):
                found.append(self.read(depth))
        elif tag == c't':
            found = tuple([self.read(depth) for _ in range(size)])
            self.met.append(found)
        elif tag == c'q':
            found = torch.Size([self.read(DEEPEST) for _ in range(size)])
        elif tag == c'd' or tag == c'o':
            found = {} if tag == c'd' else OrderedDict()
            self.met.append(found)
            for i in range(size):
                key = self.read_key(depth)
                found[key] = self.read(depth)
            if tag == c'o':
                metadata = self.read(depth)
                if metadata is not None:
                    found._metadata = metadata
        elif tag == c'S':
            found = set()
            self.met.append(found)
            for i in range(size):
                found.add(self.read_key(depth))
        elif tag == c'Z':
            found = frozenset([self.read_key(depth) for _ in range(size)])
            self.met.append(found)
        else:
            raise ProtocolError(f"a payload has tag {tag}, which is none")
        return found

    cdef object read_key(self, int depth):
        self.keys += 1
        key = self.read(depth)
        self.keys -= 1
        return key

    cdef object read_text(self, char tag, bytes data):
        try:
            text = data.decode("utf-8", "surrogatepass")
            if tag == c'y':
                return _dtypes[text]
            if tag == c'v':
                return torch.device(text)
        except (UnicodeDecodeError, KeyError, RuntimeError) as error:
            raise ProtocolError(f"a payload with {data[:80]!r} in place of text, a dtype or a device") from error
        if len(text) > REMEMBERED_FROM:
            self.met.append(text)
        return text


cdef bytes _bytes(Decoder decoder, uint32_t size):
    return PyBytes_FromStringAndSize(decoder.take(size), size)


def encode(value, references: list | None = None) -> bytes:
    """Return the encoding of a value in a strict job; RRefs met go to ``references``.

    Raises
    ------
    StrictModeError
        Something in it is not plain.
    """
    cdef Encoder encoder = Encoder()
    encode_plain(encoder, value, "value")
    data = PyBytes_FromStringAndSize(NULL, encoder.total())
    encoder.copy_to(PyBytes_AS_STRING(data))
    if references is not None:
        references.extend(encoder.references)
    return data


def decode(data: bytes, references: list | None = None):
    """Return the value of an encoding.

    Raises
    ------
    ProtocolError
        When the bytes are not one.
    """
    cdef Decoder decoder = Decoder()
    decoder.start = decoder.at = PyBytes_AS_STRING(data)
    decoder.end = decoder.start + PyBytes_GET_SIZE(data)
    decoder.references = references or []
    value = decode_plain(decoder)
    if decoder.at != decoder.end:
        raise ProtocolError(f"{decoder.end - decoder.at} bytes too many behind a payload")
    return value
