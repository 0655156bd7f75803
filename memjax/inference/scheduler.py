"""Continuous batching: a thread owns the engine and lets requests join and leave the running batch."""

import collections
import contextlib
import dataclasses
import itertools
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.stages import Lowered

from memjax.inference.engine import Engine
from memjax.inference.programs import LONGEST_CHUNK, padded_length
from memjax.inference.requests import Made, Request, TokenLogprobs
from memjax.inference.streaming import Pace
from memjax.io.console import warn

_PREFILL_ROWS = 8
"""Prompts are prefilled singly or in groups of this size, so there are two programs per width."""
_PADDED_FROM = 3
"""From this many prompts on, an incomplete group is padded: that takes about as long as prefilling two singly."""
_SHORTEST_CHUNK = 8
"""Minimum tokens per chunk with several texts, even if all of them end earlier."""
_CHUNK_SECONDS = 0.1
"""Target for the duration of a chunk, and the limit of the time spent on prefills before running texts continue."""
_RUNNING_PER_PROMPT = 6
"""Maximum running texts per waiting prompt at which a prefill may interrupt decoding. On an H200, prefilling one prompt
of 512 tokens takes as long as decoding 5 tokens of 64 texts."""
_READ_AFTER_SECONDS = 0.1
"""After this long without a prefill, a single prompt may interrupt decoding."""
_RETURN_SECONDS = 0.002
"""How long to wait for the next requests of clients whose texts have just ended, before decoding with empty slots."""
_PREFILL_TOKENS = 1 << 15
"""Prompt tokens, padding included, to prefill before running texts continue."""


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """A text requested by a client."""

    request: Request
    """With max_tokens=0 only the prompt is scored."""
    prompt_top: int | None = None
    """How many of the likeliest tokens to report at each position of the prompt; None: the prompt is not scored."""
    owner: Any = None
    """Lets the listener find the client of an update."""
    slot: int | None = None
    """Set by the scheduler: the engine slot of the text."""


@dataclasses.dataclass(slots=True)
class Update:
    """Progress of a ticket."""

    made: Made
    prompt: list[TokenLogprobs] | None = None
    """Log-probabilities of the prompt's tokens after the first."""
    error: str | None = None
    """Why the ticket failed; no further update follows."""

    @property
    def is_last(self) -> bool:
        """Whether this is the ticket's last update."""
        return self.made.finish is not None or self.error is not None


Listener = Callable[[list[tuple[Ticket, Update]]], None]


class QueueFullError(Exception):
    """The queue has no room for these texts."""


class Scheduler:
    """Runs an engine in its own thread.

    Waiting texts get slots in order of arrival. Requests for several texts take turns, one text at a time, so that a
    large request does not hold up those behind it.
    """

    def __init__(
        self,
        engine: Engine,
        listener: Listener,
        *,
        max_waiting: int,
        score: Callable[[Sequence[int], int], list[TokenLogprobs]] | None = None,
    ):
        """Takes over the engine; work begins with `start`. The listener is called on the scheduler's thread and must
        not block.
        """
        self._engine, self._listener, self._score = engine, listener, score
        self.max_waiting = max_waiting
        self.num_failures = 0
        """Number of failed engine calls."""
        self._prefill_rows = prefill_rows(engine.num_slots)
        self._groups: collections.deque[collections.deque[Ticket]] = collections.deque()
        self._num_waiting = 0
        self._running: dict[int, Ticket] = {}
        self._joining: list[Ticket] = []
        """Tickets that have left the queue but have no slot yet."""
        self._cancelled: list[Ticket] = []
        self._num_ended, self._return_due = 0, 0.0
        self._last_read = -math.inf
        self._is_open = True
        self._changed = threading.Condition()
        # The current mesh is thread-local.
        self._mesh = jax.sharding.get_mesh()
        self._threads = [threading.Thread(target=self._main, name="memjax-scheduler", daemon=True)]

    @property
    def num_slots(self) -> int:
        """Number of texts that can run at a time."""
        return self._engine.num_slots

    @property
    def num_waiting(self) -> int:
        """Tickets in the queue."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._threads[0].is_alive()

    def start(self, compile_meanwhile: Iterable[Lowered] = ()) -> None:
        """Starts the scheduler, and a thread that traces and compiles these programs before a request needs them."""
        compiler = lambda: self._compile(compile_meanwhile)
        self._threads.append(threading.Thread(target=compiler, name="memjax-compiler", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queues the tickets of one request.

        Raises:
            QueueFullError: they do not all fit into the queue; none is queued.
        """
        with self._changed:
            if self._num_waiting + len(tickets) > self.max_waiting:
                raise QueueFullError
            self._groups.append(collections.deque(tickets))
            self._num_waiting += len(tickets)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Removes a ticket from the queue or, after the current chunk, from its slot."""
        with self._changed:
            for group in self._groups:
                if ticket in group:
                    group.remove(ticket)
                    self._num_waiting -= 1
                    if not group:
                        self._groups.remove(group)
                    return
            self._cancelled.append(ticket)
            self._changed.notify()

    def stop(self, seconds: float) -> bool:
        """Ends the threads after their current step; False if any still runs after `seconds`."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        due = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, due - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh)

    def _main(self) -> None:
        with self._on_mesh():
            self._loop()

    def _compile(self, programs: Iterable[Lowered]) -> None:
        try:
            with self._on_mesh():
                for program in programs:
                    if not self._is_open:
                        return
                    program.compile()
        except Exception as error:
            warn(f"compiling ahead failed ({error}); requests that need another program wait for it")

    def _loop(self) -> None:
        pace = Pace(_CHUNK_SECONDS)
        while True:
            with self._changed:
                if not self._has_work():
                    pace = Pace(_CHUNK_SECONDS)
                while self._is_open and not self._has_work():
                    self._changed.wait()
                if not self._is_open:
                    return
            try:
                self._admit()
                if self._running and self._is_open:
                    self._hand_out(pace.step(self._engine, self._chunk()))
            except Exception as error:
                self._fail(error)

    def _admit(self) -> None:
        """Prefills waiting prompts, including new arrivals, while enough of them can join and limits allow."""
        began, num_tokens = time.monotonic(), 0
        while num_tokens < _PREFILL_TOKENS and time.monotonic() - began < _CHUNK_SECONDS:
            with self._changed:
                self._changed.wait_for(self._have_returned, max(0.0, self._return_due - time.monotonic()))
                if not self._is_open:
                    return
                cancelled, self._cancelled = self._cancelled, []
                for ticket in cancelled:
                    self._release(ticket)
                self._joining = self._take(_PREFILL_TOKENS - num_tokens) if self._is_worth_reading() else []
            joining = tuple(self._joining)
            if not joining:
                return
            self._join(joining)
            num_tokens += sum(padded_length(len(ticket.request.prompt_ids)) for ticket in joining)
            self._joining = []
            if any(ticket.request.max_tokens for ticket in joining):
                self._last_read = time.monotonic()

    def _is_worth_reading(self) -> bool:
        """Whether to prefill now; a prompt that is only scored needs no slot and never waits for others."""
        is_scored = bool(self._groups) and not self._groups[0][0].request.max_tokens
        return is_scored or self._is_enough(min(self._num_waiting, self.num_slots - len(self._running)))

    def _is_enough(self, num_prompts: int) -> bool:
        """Whether this many prompts justify pausing all running texts."""
        is_due = time.monotonic() - self._last_read >= _READ_AFTER_SECONDS
        return is_due or num_prompts * _RUNNING_PER_PROMPT >= len(self._running)

    def _chunk(self) -> int:
        """Tokens to decode before others may join: up to the last max_tokens limit within `LONGEST_CHUNK`."""
        if len(self._running) == 1:
            return LONGEST_CHUNK
        near = [count for count in self._engine.tokens_left() if count <= LONGEST_CHUNK]
        return max(_SHORTEST_CHUNK, *near) if near else LONGEST_CHUNK

    def _have_returned(self) -> bool:
        """Whether at least as many texts are waiting as have just ended."""
        return self._num_waiting >= self._num_ended or not self._is_open

    def _has_work(self) -> bool:
        return bool(self._groups or self._running or self._cancelled)

    def _release(self, ticket: Ticket) -> None:
        # The text may have ended meanwhile, and its slot hold another one.
        if ticket.slot is not None and self._running.get(ticket.slot) is ticket:
            del self._running[ticket.slot]
            self._engine.release(ticket.slot)

    def _take(self, most_tokens: int) -> list[Ticket]:
        """Takes the next tickets from the queue until their padded prompts have at least most_tokens tokens."""
        taken: list[Ticket] = []
        num_free, num_tokens = self.num_slots - len(self._running), 0
        while self._groups and num_tokens < most_tokens:
            request = self._groups[0][0].request
            if request.max_tokens:
                if not num_free:
                    break
                num_free -= 1
            group = self._groups.popleft()
            taken.append(group.popleft())
            if group:
                self._groups.append(group)
            num_tokens += padded_length(len(request.prompt_ids))
        self._num_waiting -= len(taken)
        return taken

    def _join(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if self._score is not None and ticket.prompt_top is not None:
                prompt = self._score(ticket.request.prompt_ids, ticket.prompt_top)
                made = Made([], finish=None if ticket.request.max_tokens else "length")
                self._listener([(ticket, Update(made, prompt))])
            elif not ticket.request.max_tokens:
                self._listener([(ticket, Update(Made([], finish="length")))])
            if not ticket.request.max_tokens:
                self._joining.remove(ticket)
        writing = [ticket for ticket in tickets if ticket.request.max_tokens]
        for batch in batches([len(ticket.request.prompt_ids) for ticket in writing], self._prefill_rows):
            some = [writing[place] for place in batch]
            rows = 1 if len(some) == 1 else self._prefill_rows
            slots = self._engine.insert([ticket.request for ticket in some], prefill_rows=rows)
            for ticket, slot in zip(some, slots, strict=True):
                ticket.slot = slot
                self._running[slot] = ticket
        if writing:
            self._hand_out(self._engine.step(0))

    def _hand_out(self, found: dict[int, Made]) -> None:
        updates = [(self._running[slot], Update(made)) for slot, made in found.items()]
        ended = [slot for slot, made in found.items() if made.finish is not None]
        for slot in ended:
            del self._running[slot]
        # Finished texts first: their clients are the next to send requests.
        self._listener(sorted(updates, key=lambda pair: not pair[1].is_last))
        self._num_ended = len(ended)
        is_worth = self._running and not self._num_waiting and self._is_enough(len(ended))
        self._return_due = time.monotonic() + _RETURN_SECONDS if is_worth else 0.0

    def _fail(self, error: Exception) -> None:
        """Fails the tickets whose texts are lost; the scheduler continues with the waiting ones."""
        self.num_failures += 1
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exception(error)
        lost = dict.fromkeys(itertools.chain(self._running.values(), self._joining))
        self._running, self._joining = {}, []
        self._engine.reset()
        is_full = "RESOURCE_EXHAUSTED" in str(error)
        reason = "the device is out of memory" if is_full else f"the engine failed ({type(error).__name__})"
        self._listener([(ticket, Update(Made([]), error=reason)) for ticket in lost])


def prefill_rows(num_slots: int) -> int:
    """Prompts prefilled at once if enough are waiting: a power of two."""
    return 1 << (min(_PREFILL_ROWS, num_slots).bit_length() - 1)


def batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices of prompts to prefill together: of the same padded length, up to `rows` at once or one alone."""
    by_width = collections.defaultdict(list)
    for place, length in enumerate(lengths):
        by_width[padded_length(length)].append(place)
    found = []
    for places in by_width.values():
        for start in range(0, len(places), rows):
            some = places[start : start + rows]
            found += [some] if len(some) == rows or len(some) >= _PADDED_FROM else [[place] for place in some]
    return found
