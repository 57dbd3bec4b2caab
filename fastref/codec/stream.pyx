"""The fast encoding of plain values.

One byte says what comes: None, True, False, an int of 64 bits, a float, str, bytes, bytearray, tuple, list, dict, a
reference (by its number in the frame) or a plain CPU tensor. Whatever else is in a value, a mutable object that is met
twice or two tensors that share memory make the encoder say no; then the whole value goes through pickle, so that
identity, cycles and sharing survive.
"""

from cpython.bytearray cimport (PyByteArray_AS_STRING, PyByteArray_CheckExact, PyByteArray_FromStringAndSize,
                                PyByteArray_GET_SIZE)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_CheckExact, PyDict_Next, PyDict_Size
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact, PyFloat_FromDouble
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact, PyLong_FromLongLong
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastref.codec.payload cimport Decoder, Encoder
from fastref.codec.tensors cimport is_plain_tensor, read_tensor, write_tensor
from fastref.rref cimport RRef

from fastref.errors import ProtocolError

__all__ = ["encode", "decode"]

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cdef enum:
    DEEPEST = 64            # nesting that the recursive functions follow; deeper values are pickled
    MOST_CONTAINERS = 4096  # a tuple is written at each meeting; pickle writes it once, whatever the number
    LONG_TEXT = 4096        # longer strings are worth remembering, and bytes worth copying only once


cdef int encode_value(Encoder encoder, object value, int depth) except -1:
    """Append one value; False when it takes pickle (what was appended so far is then of no use)."""
    cdef long long number
    cdef int overflow = 0
    cdef double real
    cdef const char* text
    cdef Py_ssize_t size, i
    cdef PyObject* key
    cdef PyObject* item
    cdef char* at
    if value is None:
        encoder.grow(1)[0] = c'N'
    elif value is True:
        encoder.grow(1)[0] = c'T'
    elif value is False:
        encoder.grow(1)[0] = c'F'
    elif PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow:
            return False
        at = encoder.grow(9)
        at[0] = c'i'
        memcpy(at + 1, &number, 8)
    elif PyFloat_CheckExact(value):
        real = PyFloat_AS_DOUBLE(value)
        at = encoder.grow(9)
        at[0] = c'f'
        memcpy(at + 1, &real, 8)
    elif PyUnicode_CheckExact(value):
        try:
            text = PyUnicode_AsUTF8AndSize(value, &size)
        except UnicodeEncodeError:  # lone surrogates; pickle carries them
            return False
        if size > 1 << 30 or (size > LONG_TEXT and not encoder.first_meeting(value)):
            return False
        encoder.tag32(c's', size)
        encoder.raw(text, size)
    elif PyBytes_CheckExact(value):
        size = PyBytes_GET_SIZE(value)
        if size > LONG_TEXT and not encoder.first_meeting(value):
            return False
        if size > LONG_TEXT:
            at = encoder.grow(9)
            at[0] = c'B'
            memcpy(at + 1, &size, 8)
            encoder.segment(PyBytes_AS_STRING(value), size, NULL, False, value)
        else:
            encoder.tag32(c'b', size)
            encoder.raw(PyBytes_AS_STRING(value), size)
    elif PyByteArray_CheckExact(value):
        size = PyByteArray_GET_SIZE(value)
        if size > 1 << 30 or not encoder.first_meeting(value):
            return False
        if size > LONG_TEXT:
            encoder.tag32(c'A', size)
            # The view keeps it from being resized meanwhile.
            encoder.segment(PyByteArray_AS_STRING(value), size, NULL, False, memoryview(value))
        else:
            encoder.tag32(c'a', size)
            encoder.raw(PyByteArray_AS_STRING(value), size)
    elif depth >= DEEPEST or encoder.containers >= MOST_CONTAINERS:
        return False
    elif PyTuple_CheckExact(value):
        size = PyTuple_GET_SIZE(value)
        encoder.containers += 1
        encoder.tag32(c't', size)
        for i in range(size):
            if not encode_value(encoder, <object>PyTuple_GET_ITEM(value, i), depth + 1):
                return False
    elif PyList_CheckExact(value):
        size = PyList_GET_SIZE(value)
        if not encoder.first_meeting(value):
            return False
        encoder.tag32(c'l', size)
        for i in range(size):
            if i >= PyList_GET_SIZE(value) or not encode_value(encoder, <object>PyList_GET_ITEM(value, i), depth + 1):
                return False
        if PyList_GET_SIZE(value) != size:
            return False
    elif PyDict_CheckExact(value):
        size = PyDict_Size(value)
        if not encoder.first_meeting(value):
            return False
        encoder.tag32(c'd', size)
        i = 0
        while PyDict_Next(value, &i, &key, &item):
            if not encode_value(encoder, <object>key, depth + 1) or not encode_value(encoder, <object>item, depth + 1):
                return False
            size -= 1
        if size:
            return False
    elif type(value) is RRef:
        if not encoder.first_meeting(value):
            return False
        encoder.tag32(c'R', len(encoder.references))
        encoder.references.append(value)
    elif is_plain_tensor(value):
        return write_tensor(encoder, value)
    else:
        return False
    return True


cdef object decode_value(Decoder decoder, int depth):
    """Read one value. Every length is checked against the bytes that are there."""
    cdef char tag = decoder.take(1)[0]
    cdef int64_t number
    cdef double real
    cdef uint32_t size, i
    if tag == c'N':
        return None
    if tag == c'T':
        return True
    if tag == c'F':
        return False
    if tag == c'i':
        memcpy(&number, decoder.take(8), 8)
        return PyLong_FromLongLong(number)
    if tag == c'f':
        memcpy(&real, decoder.take(8), 8)
        return PyFloat_FromDouble(real)
    if tag == c'X' or tag == c'Y':
        return read_tensor(decoder, tag == c'Y')
    if tag == c'B':
        memcpy(&number, decoder.take(8), 8)
        if number < 0:
            raise ProtocolError(f"a payload claims {<uint64_t>number} bytes")
        return PyBytes_FromStringAndSize(decoder.aligned(number), number)
    size = decoder.number()
    if tag == c's':
        try:
            return PyUnicode_DecodeUTF8(decoder.take(size), size, NULL)
        except UnicodeDecodeError as error:
            raise ProtocolError("a payload with text that is not UTF-8") from error
    if tag == c'b':
        return PyBytes_FromStringAndSize(decoder.take(size), size)
    if tag == c'a':
        return PyByteArray_FromStringAndSize(decoder.take(size), size)
    if tag == c'A':
        return PyByteArray_FromStringAndSize(decoder.aligned(size), size)
    if tag == c'R':
        if size >= len(decoder.references):
            raise ProtocolError(f"a payload names reference {size} of {len(decoder.references)}")
        return decoder.references[size]
    decoder.claimed += size  # each element takes a byte at least: all claims together fit in the payload
    if depth >= DEEPEST or decoder.claimed > <uint64_t>(decoder.end - decoder.start):
        raise ProtocolError(f"a payload claims a container of {size} in {decoder.end - decoder.at} bytes")
    if tag == c't':
        row = PyTuple_New(size)
        for i in range(size):
            item = decode_value(decoder, depth + 1)
            Py_INCREF(item)
            PyTuple_SET_ITEM(row, i, item)
        return row
    if tag == c'l':
        return [decode_value(decoder, depth + 1) for _ in range(size)]
    if tag == c'd':
        pairs = {}
        for i in range(size):
            key = decode_value(decoder, depth + 1)
            try:
                pairs[key] = decode_value(decoder, depth + 1)
            except TypeError as error:
                raise ProtocolError("a payload with a key that cannot be one") from error
        return pairs
    raise ProtocolError(f"a payload has tag {tag}, which is none")


def encode(value, references: list | None = None) -> bytes | None:
    """Return the fast encoding of ``value``, or None when it takes pickle; RRefs met go to ``references``."""
    cdef Encoder encoder = Encoder()
    if not encode_value(encoder, value, 0):
        return None
    data = PyBytes_FromStringAndSize(NULL, encoder.total())
    encoder.copy_to(PyBytes_AS_STRING(data))
    if references is not None:
        references.extend(encoder.references)
    return data


def decode(data: bytes, references: list | None = None):
    """Return the value of a fast encoding.

    Raises
    ------
    ProtocolError
        When the bytes are not one.
    """
    cdef Decoder decoder = Decoder()
    decoder.start = decoder.at = PyBytes_AS_STRING(data)
    decoder.end = decoder.start + PyBytes_GET_SIZE(data)
    decoder.references = references or []
    value = decode_value(decoder, 0)
    if decoder.at != decoder.end:
        raise ProtocolError(f"{decoder.end - decoder.at} bytes too many behind a payload")
    return value
