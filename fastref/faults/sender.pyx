"""Calls out, some of which fail or come late, as a plan says.

The runtime above overrides nothing of a call's way but these steps, which are virtual already: an ordinary runtime knows
nothing of faults.
"""

from hashlib import blake2b

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport fr_now_ns
from fastref.codec.payload cimport Encoder
from fastref.faults.late cimport LateChannel
from fastref.rref cimport OwnedValue, RRef
from fastref.runtime.peer cimport Peer
from fastref.runtime.references cimport ASK_WHETHER_THERE, NEVER_MADE
from fastref.runtime.serve cimport Server
from fastref.wire.frame cimport PYTHON_CALL, PYTHON_REMOTE_CALL, RREF_FETCH_CALL, fr_frame

import torch
from torch.jit._builtins import _find_builtin

from fastref.errors import PeerError
from fastref.faults.agenda import Agenda

__all__ = ["FaultySender"]

cdef int64_t PATIENCE_NS = 60000000000
cdef str SCRIPT_TYPE = "Any"    # of a value that TorchScript makes; one of Python's has none


cdef class FaultySender(Server):
    """The part of a runtime through which calls leave. ``plan`` is to be set before the first peer is added."""

    cdef public object plan
    cdef readonly object agenda
    cdef dict origins           # call that is being sent -> "PYTHON", "SCRIPT", or None: no call of the program's

    def __cinit__(self, *args, **kwargs):
        self.agenda, self.origins = Agenda(), {}

    def add_peer(self, peer: Peer) -> None:
        """As ``Post.add_peer``; records to the peer may be kept back from now on."""
        (<Peer>peer).channel = LateChannel((<Peer>peer).channel, self.agenda)
        super().add_peer(peer)

    def look_sooner(self) -> None:
        """Have ``expire`` called when the next action of the agenda is due."""
        cdef int64_t due_ns = self.agenda.next_ns
        if due_ns < self.next_expiry_ns:
            self.next_expiry_ns = due_ns
            self.expires_sooner()

    cdef int prepare(self, Peer peer, fr_frame* head, Encoder body, object func, RRef target, str method, tuple args,
                     dict kwargs) except -1:
        cdef RRef made = body.references[0] if body.references else None  # by a remote()
        if made is not None and _is_script(func):
            made.type_str = SCRIPT_TYPE
        Server.prepare(self, peer, head, body, func, target, method, args, kwargs)
        for rref in body.references:  # now, not through the call's future
            if (<RRef>rref).creation is not None:
                raise (<RRef>rref).creation_error()
        if target is not None:
            self.origins[head.call] = None if method is ASK_WHETHER_THERE else "PYTHON"
        else:
            self.origins[head.call] = "SCRIPT" if _is_script(func) else "PYTHON"
        return 0

    cdef int64_t post(self, Peer peer, fr_frame* head, Encoder body, int64_t deadline_ns, bint lends=False) except -1:
        cdef LateChannel channel = <LateChannel>peer.channel
        cdef uint64_t call = head.call
        cdef int64_t position
        cdef str name = self._name_of(head, body)
        if name is None or peer.is_dead:
            return Server.post(self, peer, head, body, deadline_ns, lends)
        if self.plan.may_fail(name) and self.plan.fails(name, _content(peer, head, body)):
            text = f"RPCErr:2:Send attempt failed intentionally for {name} to worker {peer.info.name!r}"
            if head.kind == PYTHON_REMOTE_CALL:
                text += f": {NEVER_MADE}"
            raise PeerError(text, peer.info.name)
        delay_s = self.plan.delay_s(name)
        if not delay_s:
            return Server.post(self, peer, head, body, deadline_ns, lends)
        channel.keep_back(call, delay_s)
        try:
            position = Server.post(self, peer, head, body, deadline_ns, lends)
        finally:
            channel.forget(call)
        self.look_sooner()
        return position

    cdef str _name_of(self, fr_frame* head, Encoder body):
        """What torch calls a frame, if it is a request of the program's."""
        if head.kind == RREF_FETCH_CALL:
            origin = "PYTHON" if (<RRef>body.references[0]).type_str is None else "SCRIPT"
            return f"{origin}_RREF_FETCH_CALL"
        if head.kind != PYTHON_CALL and head.kind != PYTHON_REMOTE_CALL:
            return None
        origin = self.origins.pop(head.call, None)
        if origin is None:
            return None
        return f"{origin}_CALL" if head.kind == PYTHON_CALL else f"{origin}_REMOTE_CALL"

    cdef object call_remote(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s):
        cdef RRef rref = Server.call_remote(self, peer, func, target, method, args, kwargs, timeout_s)
        if rref.creation is not None and rref.holder is not None and rref.owned is None and not peer.is_dead:
            # The owner lives and never hears of it: the entry is let go of now, not with the last handle.
            holder, rref.holder = rref.holder, None
            holder.release(rref.fork.index)
        return rref

    cdef tuple credit(self, Peer peer, int64_t deadline_ns, double timeout_s):
        """As in ``ReferenceCaller``; asking for entries does not use up the call's time: in torch nothing is asked."""
        return Server.credit(self, peer, deadline_ns and max(deadline_ns, fr_now_ns() + PATIENCE_NS), timeout_s)

    cdef int publish(self, OwnedValue owned, uint32_t index) except -1:
        """Values are not published: each fetch is a message."""
        self.table.set_state(index, "ready")
        return 0


cdef bint _is_script(object func) except -1:
    """Whether torch would run a call without the interpreter."""
    return isinstance(func, torch.jit.ScriptFunction) or _find_builtin(func) is not None


cdef bytes _content(Peer peer, fr_frame* head, Encoder body):
    """Bytes that are equal for equal requests to one worker: of function, arguments, and references by their names."""
    data = PyBytes_FromStringAndSize(NULL, body.total())
    body.copy_to(PyBytes_AS_STRING(data))
    names = [((<RRef>rref).fork.rref_created_on, (<RRef>rref).fork.rref_local) for rref in body.references]
    digest = blake2b(f"{peer.rank} {head.callable} {names} ".encode(), digest_size=16)
    digest.update(data)
    return digest.digest()
