"""One worker's share in a backward pass: gradients come in, its part of the graph runs, gradients go out.

Whoever brings gradients runs what they make possible, unless another thread is at it already: that one looks again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import record_function

from fastref.autograd.graph import LocalGraph
from fastref.autograd.links import Received
from fastref.autograd.record import DistAutogradContext
from fastref.autograd.torch_names import is_profiled
from fastref.codec.registry import register
from fastref.errors import BackwardError, FastrefError
from fastref.futures import Future
from fastref.rref import current_wiring

if TYPE_CHECKING:
    from fastref.autograd.contexts import Contexts

__all__ = ["ROOTS", "Gradients", "Share"]

Gradients = list[tuple[int, list[torch.Tensor | None]]]
"""Numbers of links, and what comes back over each: a gradient for each of its tensors."""

_not_shown = contextlib.nullcontext
ROOTS = 0  # the entry of the pass itself; links begin at 1


class Share:
    """What one worker does in one pass.

    Parameters
    ----------
    contexts : Contexts
    context : DistAutogradContext
    key : (int, int)
        Who runs the pass, and which of its passes it is.
    keep : bool
        The graph stays, for another pass.
    """

    def __init__(self, contexts: Contexts, context: DistAutogradContext, key: tuple[int, int], keep: bool) -> None:
        self.key = key
        self.over = threading.Lock()  # held until the end
        self.over.acquire()
        self.is_over = False
        self.when_failed: Callable[[BaseException], None] | None = None
        self.error: BaseException | None = None
        self.held_back: dict[int, Gradients] | None = None  # by rank, instead of being sent; None: they are sent
        self._contexts, self._context = contexts, context
        self._graph = LocalGraph(context._context_id(), keep)
        self._mail: deque[tuple[int, list[Any]]] = deque()
        self._turn = threading.Lock()  # of who runs; never waited for
        self._unconfirmed: set[object] = set()  # one for each message whose receiver has not said that it has it
        self.is_open = False  # who runs the pass runs his roots before he knows what else comes to him
        self._delivered = False
        self._open: list[None] = [None]  # taken by whoever ends it
        self._outcome: Future[None] | None = None
        self._untold: list[None] = [None]  # taken by whoever tells the outcome

    # ---- which part of the graph it is

    def begin(self, edges: list[tuple[Any, int]]) -> list[tuple[int, int]]:
        """Take the roots of the pass; return (rank, link) of what they reach on other workers."""
        return [(node.rank, node.link) for node in self._graph.enter(ROOTS, edges)]

    def explore(self, links: list[int] | None) -> list[tuple[int, int]]:
        """Gradients will come over links, over all that there are by None; return (rank, link) of what they reach."""
        sends = self._context.sends
        found: list[tuple[int, int]] = []
        for link in list(sends) if links is None else links:
            if not self._graph.has(link):
                if link not in sends:
                    raise BackwardError(
                        f"Error on Node {self._contexts.rank}: nothing was sent as link {link} of autograd context"
                        f" {self._context._context_id()}"
                    )
                edges = sends[link].next_functions
                found += [(node.rank, node.link) for node in self._graph.enter(link, edges)]
        return found

    def is_apart(self) -> bool:
        """Tell whether no part of the graph that has been reached leads where what was sent from here leads, too."""
        return self._graph.is_apart_from(
            node for sent in list(self._context.sends.values()) for node, _ in sent.next_functions
        )

    def knows_all(self) -> bool:
        """Tell whether gradients come for everything that was sent from here."""
        return self._graph.entries == len(self._context.sends)

    def close(self) -> None:
        """All entries are known, and nobody else runs: it is done when all gradients have come and gone."""
        self.is_open, self._delivered = False, self._graph.is_complete
        self._look_for_end()

    # ---- gradients

    def put(self, gradients: Gradients) -> None:
        """Gradients have come; they are taken with the next ones."""
        self._mail.extend(gradients)

    def take(self, gradients: Gradients) -> None:
        """Gradients have come: run what they make possible."""
        self._mail.extend(gradients)
        while self._mail and self.error is None and self._turn.acquire(blocking=False):
            try:
                self._run()
            except BaseException as error:
                self.fail(self._described(error))
                if not isinstance(error, Exception):
                    raise
            finally:
                self._turn.release()

    def _run(self) -> None:
        graph = self._graph
        shown = record_function if is_profiled() else _not_shown
        while self._mail:
            link, gradients = self._mail.popleft()
            if link == ROOTS:
                graph.arrive(link, gradients)
            else:
                with shown(self._context.sends[link].name()):
                    graph.arrive(link, gradients)
            del gradients
        ends = graph.run()
        ends.reverse()
        leaving: dict[int, Gradients] = {}
        while ends:
            node, found = ends.pop()
            if self.error is not None:
                return
            if type(node) is Received:
                with shown(node.name()):
                    leaving.setdefault(node.rank, []).append((node.link, found))
            else:
                self._context.accumulate(node, found)
        self._send(leaving)
        self._delivered = graph.is_complete
        self._look_for_end()

    def _send(self, leaving: dict[int, Gradients]) -> None:
        own = leaving.pop(self._contexts.rank, None)
        if own:
            self._mail.extend(own)
        if self.held_back is not None:
            for rank, gradients in leaving.items():
                self.held_back.setdefault(rank, []).extend(gradients)
            return
        for rank, gradients in leaving.items():
            token = object()
            self._unconfirmed.add(token)
            future = self._contexts.call(rank, take_gradients, (self._context._context_id(), self.key, gradients))
            future.add_done_callback(functools.partial(self._confirmed, token))

    def _confirmed(self, token: object, future: Any) -> None:
        try:
            future.value()
        except Exception as error:
            self.fail(error.with_traceback(None))  # which holds this frame
        self._unconfirmed.discard(token)
        self._look_for_end()

    # ---- the end

    def _look_for_end(self) -> None:
        if self._delivered and not self.is_open and not self._unconfirmed:
            self._settle(None)

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended; nothing of it is run or sent any more."""
        self._settle(error)

    def _settle(self, error: BaseException | None) -> None:
        try:
            self._open.pop()
        except IndexError:
            return
        self.error = error
        self._mail.clear()
        self.is_over = True  # behind the error; before who waits, or asks for the outcome, is looked for
        self.over.release()
        if self._outcome is not None:
            self._tell(self._outcome)
        told, self.when_failed = self.when_failed, None
        if error is not None and told is not None:
            told(error)

    def check(self) -> None:
        """Raise what it has failed with, fresh: the one that is kept must not remember who raises it."""
        if self.error is None:
            return
        fresh = copy.copy(self.error)
        try:
            raise fresh
        finally:
            del fresh  # it remembers this frame

    @property
    def outcome(self) -> Future[None]:
        """A future of the end; asked for by one thread."""
        future = self._outcome
        if future is None:
            future = self._outcome = Future()
            if self.is_over:  # who ended it may have looked before
                self._tell(future)
        return future

    def _tell(self, future: Future[None]) -> None:
        try:
            self._untold.pop()
        except IndexError:
            return
        if self.error is None:
            future.set_result(None)
        else:
            future.set_exception(self.error)

    def _described(self, error: BaseException) -> BaseException:
        if isinstance(error, FastrefError):
            return error.with_traceback(None)
        found = BackwardError(f"Error on Node {self._contexts.rank}: {error}")
        # As text: the frames of the traceback hold the share, and the graph, as long as somebody has the error.
        found.add_note("".join(traceback.format_exception(error)))
        return found


@register
def take_gradients(context_id: int, key: tuple[int, int], gradients: Gradients) -> None:
    """On a worker that sent tensors: take their gradients."""
    current_wiring().autograd.share(context_id, key).take(gradients)
