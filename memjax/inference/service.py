"""State shared by the HTTP endpoints: scheduler, API key, limits, running completions."""

import asyncio
import contextlib
import dataclasses
import hmac
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from memjax.data.tokenizers.base import Tokenizer
from memjax.inference.bodies import RefusedError
from memjax.inference.choices import Choice, Piece
from memjax.inference.completions import CompletionRequest
from memjax.inference.metrics import Metrics
from memjax.inference.requests import Made
from memjax.inference.scheduler import QueueFullError, Scheduler, Ticket, Update


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits on what a client may request, and how slowly."""

    max_length: int
    """Maximum tokens of a prompt and its completion together."""
    max_body_bytes: int = 2 << 20
    max_choices: int = 128
    """Maximum number of texts per request."""
    body_seconds: float = 30.0
    """Time limit for sending the head of a request, and again for the body."""
    stall_seconds: float = 60.0
    """A client that reads nothing for this long is disconnected."""


class Service:
    """State shared by the endpoints. All methods run on one event loop, except `deliver`, which the scheduler calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        model_name: str,
        limits: Limits,
        api_key: str | None = None,
    ):
        self.tokenizer, self.vocab_size, self.model_name, self.limits = tokenizer, vocab_size, model_name, limits
        self.created = int(time.time())
        self.is_draining = False
        self.is_crowded: Callable[[], bool] = lambda: False
        """Whether too many clients are connected."""
        self.metrics = Metrics()
        self._key = None if api_key is None else api_key.encode()
        self._active: set[Answer] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """The attached scheduler."""
        assert self._scheduler is not None, "attach a scheduler first"
        return self._scheduler

    @property
    def num_active(self) -> int:
        """Number of running completions."""
        return len(self._active)

    def attach(self, scheduler: Scheduler) -> None:
        """Attaches the scheduler, whose listener must be `deliver`, and adds its gauges to the metrics."""
        self._scheduler = scheduler
        gauge = self.metrics.gauge
        gauge("memjax_slots", "Texts that can run at a time.", lambda: scheduler.num_slots)
        gauge("memjax_slots_in_use", "Texts being generated.", lambda: scheduler.num_running)
        gauge("memjax_queue_length", "Texts waiting for a slot.", lambda: scheduler.num_waiting)
        gauge("memjax_engine_failures", "Failed engine calls.", lambda: scheduler.num_failures)

    def bind_loop(self) -> None:
        """Makes the running event loop the one that receives updates."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, updates: list[tuple[Ticket, Update]]) -> None:
        """Passes updates on to the event loop, from the scheduler's thread."""
        # A closed loop, which raises RuntimeError, has no clients left.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hand_out, updates)

    def _hand_out(self, updates: list[tuple[Ticket, Update]]) -> None:
        self.metrics.add_tokens(sum(len(update.made.tokens) for _, update in updates))
        self.metrics.reused_tokens += sum(update.made.num_reused for _, update in updates)
        for ticket, update in updates:
            answer, choice = ticket.owner
            answer.inbox.put_nowait((choice, update))

    def check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Raises a RefusedError if the API key is missing or wrong."""
        if self._key is None:
            return
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if not (hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"):
            raise RefusedError(
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def refuse_when_draining(self) -> None:
        """Raises a RefusedError while the server is shutting down."""
        if self.is_draining:
            raise RefusedError("the server is shutting down; try another one", status=503, headers={"Retry-After": "5"})

    def refuse_when_crowded(self) -> None:
        """Raises a RefusedError, which closes the connection, while too many clients are connected."""
        if self.is_crowded():
            headers = {"Retry-After": "5", "Connection": "close"}
            raise RefusedError("too many clients are connected; try again later", status=503, headers=headers)

    def abort(self) -> None:
        """Ends every answer with an error."""
        for answer in self._active:
            for choice in answer.choices:
                answer.inbox.put_nowait((choice, Update(Made([]), error="the server is shutting down")))

    @contextlib.contextmanager
    def answering(self, request: CompletionRequest, choices: list[Choice]) -> Iterator["Answer"]:
        """Submits the choices; on exit, those that are not done are cancelled."""
        answer = Answer(request, choices)
        for choice in choices:
            choice.ticket.owner = answer, choice
        try:
            self.scheduler.submit([choice.ticket for choice in choices])
        except QueueFullError:
            raise self._queue_is_full() from None
        self.metrics.prompt_tokens += answer.usage()["prompt_tokens"]
        self._active.add(answer)
        try:
            yield answer
        finally:
            self._active.discard(answer)
            for choice in choices:
                if not choice.is_done:
                    self.scheduler.cancel(choice.ticket)
            if answer.is_done:
                self.metrics.whole_request.add(time.monotonic() - answer.began)

    def _queue_is_full(self) -> RefusedError:
        scheduler = self.scheduler
        waiting = scheduler.num_waiting
        seconds = math.ceil(self.metrics.whole_request.mean * waiting / scheduler.num_slots)
        return RefusedError(
            f"{waiting:,} texts wait for a slot, and at most {scheduler.max_waiting:,} may; try again later",
            status=429,
            code="queue_full",
            headers={"Retry-After": str(min(60, max(1, seconds)))},
        )


class Answer:
    """A running completion."""

    def __init__(self, request: CompletionRequest, choices: list[Choice]):
        self.request, self.choices = request, choices
        self.inbox: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()
        self.began = time.monotonic()
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def is_done(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.is_done for choice in self.choices)

    async def pieces(self, service: Service) -> AsyncIterator[tuple[Choice, Piece]]:
        """Yields pieces of the choices as they arrive, until all are done.

        Raises:
            RefusedError: the engine failed.
        """
        is_first = True
        while not self.is_done:
            choice, update = await self.inbox.get()
            if update.error is not None:
                raise RefusedError(
                    f"{update.error}; try again", status=503 if service.is_draining else 500, code="engine_error"
                )
            if choice.is_done:
                continue
            if is_first and update.made.tokens:
                service.metrics.first_token.add(time.monotonic() - self.began)
                is_first = False
            piece = choice.add(update)
            if choice.is_done and not update.is_last:
                # It ended at a stop string, which the engine does not know of.
                service.scheduler.cancel(choice.ticket)
            if piece.text or piece.finish or (piece.logprobs and piece.logprobs["tokens"]):
                yield choice, piece

    def document(self, service: Service, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The body of a response, or of one event of a streamed response."""
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": service.model_name}
        return {**head, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        """Token counts: each prompt once, regardless of `n`, and all choices."""
        firsts = self.choices[:: self.request.n]
        prompt = sum(len(one.ticket.request.prompt_ids) for one in firsts)
        made = sum(choice.generated.num_tokens for choice in self.choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {**usage, "prompt_tokens_details": {"cached_tokens": sum(one.num_reused for one in firsts)}}
