"""Which values may be read without their owner."""

from cpython.object cimport PyObject


cdef enum:
    NOT_PUBLISHABLE = 0
    UNREACHABLE = 1         # nobody else can change it, as long as nobody can reach it
    IMMUTABLE = 2           # nobody can ever change it


cdef int value_publishability(PyObject* value) except -1
