"""Which values may be read without their owner: those that nobody can ever change, or that nobody else can reach.

A stale read would be silent, so what is not known for certain is not published. Reachable means from code of the
program: by a Python object, by a tensor that shares the memory (a view, a detached tensor, what autograd has saved), by
an object that shares it in another way (an array of numpy, a storage, another library's tensor), by a weak reference.
Addresses of memory and objects that the garbage collector lists are beyond what can be known.
"""

from cpython.object cimport PyObject, PyTypeObject

from fastref.codec.tensors cimport is_made_here

import logging
import sys
import weakref

import torch

__all__ = ["publishability"]

logger = logging.getLogger("fastref")

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject*)
    PyTypeObject* Py_TYPE(PyObject*)
    Py_ssize_t PyTuple_GET_SIZE(PyObject*)
    PyObject* PyTuple_GET_ITEM(PyObject*, Py_ssize_t)
    Py_ssize_t PyList_GET_SIZE(PyObject*)
    PyObject* PyList_GET_ITEM(PyObject*, Py_ssize_t)
    int PyDict_Next(PyObject*, Py_ssize_t*, PyObject**, PyObject**)
    PyTypeObject PyList_Type, PyDict_Type, PyTuple_Type

cdef enum:
    DEEPEST = 16
    MOST_PARTS = 1024       # looked at, tensors above all: each takes about a microsecond

cdef object Tensor = torch.Tensor
cdef PyObject* tensor_type = <PyObject*>Tensor
cdef object strided = torch.strided
cdef object weak_references = weakref.getweakrefcount
cdef object owners_of_storage = torch._C._storage_Use_Count
cdef object references_to = sys.getrefcount
cdef int _storage_owners = 0, _storage_references = 0, _tensor_owners = 0   # of a tensor that nobody else can reach


cdef int value_publishability(PyObject* value) except -1:
    """How a value that its caller holds with exactly one reference can be published."""
    cdef int parts = 0
    return _look(value, 1, 0, &parts)


def publishability(holder: list) -> str:
    """Say how the one item of a list, which nobody but the list may hold, can be published.

    Returns
    -------
    str
        "immutable": for ever. "unreachable": until somebody can reach it. "no".
    """
    cdef int parts = 0
    found = _look(PyList_GET_ITEM(<PyObject*>holder, 0), 1, 0, &parts)
    return ("no", "unreachable", "immutable")[found]


cdef int _look(PyObject* value, Py_ssize_t references, int depth, int* parts) except -1:
    cdef PyTypeObject* kind = Py_TYPE(value)
    cdef PyObject* key
    cdef PyObject* item
    cdef Py_ssize_t i = 0
    cdef int found = IMMUTABLE, part
    parts[0] += 1
    if depth > DEEPEST or parts[0] > MOST_PARTS:
        return NOT_PUBLISHABLE
    if _is_scalar(<object>value):
        return IMMUTABLE
    if kind == &PyTuple_Type:
        for i in range(PyTuple_GET_SIZE(value)):
            part = _look(PyTuple_GET_ITEM(value, i), 1, depth + 1, parts)
            if part == NOT_PUBLISHABLE:
                return NOT_PUBLISHABLE
            found = min(found, part)
        return found if found == IMMUTABLE or Py_REFCNT(value) == references else NOT_PUBLISHABLE
    if Py_REFCNT(value) != references:
        return NOT_PUBLISHABLE
    if kind == &PyList_Type:
        for i in range(PyList_GET_SIZE(value)):
            if _look(PyList_GET_ITEM(value, i), 1, depth + 1, parts) == NOT_PUBLISHABLE:
                return NOT_PUBLISHABLE
        return UNREACHABLE
    if kind == &PyDict_Type:
        while PyDict_Next(value, &i, &key, &item):
            if not _is_scalar(<object>key) or _look(item, 1, depth + 1, parts) == NOT_PUBLISHABLE:
                return NOT_PUBLISHABLE
        return UNREACHABLE
    if <PyObject*>kind == tensor_type and _storage_owners and _is_alone(<object>value):
        return UNREACHABLE
    return NOT_PUBLISHABLE


cdef bint _is_scalar(object value) noexcept:
    kind = type(value)
    return value is None or kind is bool or kind is int or kind is float or kind is str or kind is bytes


cdef bint _is_alone(object tensor) except -1:
    """Whether nothing but the one Python object reaches a tensor's memory."""
    if tensor.requires_grad or tensor.layout is not strided or not tensor.is_cpu or tensor._backward_hooks or weak_references(tensor):
        return False
    storage = tensor.untyped_storage()
    # Of torch's own allocator, or received; memory that comes from elsewhere may be somebody else's too. Torch marks so
    # whatever it has handed to numpy as well.
    return ((storage.resizable() or is_made_here(storage.data_ptr())) and not storage.is_shared() and tensor._use_count() == _tensor_owners
            and owners_of_storage(storage._cdata) == _storage_owners and references_to(storage) == _storage_references)


def _calibrate() -> None:
    """Learn the counts of a tensor that nobody else can reach, and see that they tell when somebody can."""
    global _storage_owners, _storage_references, _tensor_owners
    try:
        tensor = torch.empty(1)
        storage = tensor.untyped_storage()
        _tensor_owners, _storage_owners = tensor._use_count(), owners_of_storage(storage._cdata)
        _storage_references = references_to(storage)
        del storage
        alone = [torch.empty(1)]
        knows = publishability(alone) == "unreachable"
        for reach in (lambda t: t, lambda t: t[:], lambda t: t.detach(), lambda t: t.untyped_storage(), weakref.ref,
                      lambda t: t.numpy(), lambda t: (t * torch.ones(1, requires_grad=True)),
                      lambda t: torch.utils.dlpack.to_dlpack(t)):
            alone = [torch.empty(1)]
            reaching = reach(alone[0])
            knows = knows and publishability(alone) == "no"
            del reaching
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.debug("this torch does not tell who shares a tensor's memory: %s", error)
        knows = False
    if not knows:
        _storage_owners = 0


_calibrate()
