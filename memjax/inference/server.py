"""OpenAI's HTTP interface over a scheduler: an ASGI application, and uvicorn that runs it.

The event loop does everything but the model: it checks requests, makes text of tokens, and notices who hangs up. JAX
runs in the scheduler's thread alone.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from memjax.data.tokenizers.base import Tokenizer
from memjax.inference.completions import (
    Choice,
    CompletionRequest,
    Piece,
    RefusedError,
    make_choices,
    parse_detokenize,
    parse_json,
    parse_request,
    parse_tokenize,
    prompt_ids,
    shown,
)
from memjax.inference.engine import Made
from memjax.inference.metrics import Metrics
from memjax.inference.scheduler import QueueFullError, Scheduler, Ticket, Update
from memjax.io.console import say

T = TypeVar("T")

HUNG_UP = 499
"""The status under which requests are counted whose client has gone."""
_DISCARDED = 8
"""Bodies of up to so many times the limit are read to their end, so that clients see why they are refused."""
_SHUTDOWN_SECONDS = 5.0
"""For the last bytes of answers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one client may ask for."""

    max_length: int
    """Tokens of a prompt and its answer together."""
    max_body_bytes: int = 2 << 20
    max_choices: int = 128
    """Texts of one request."""
    body_seconds: float = 30.0
    """For a client to send its request: the head, and again the body."""
    stall_seconds: float = 60.0
    """For a client to read what was sent before its answer is given up."""


class HungUpError(Exception):
    """The client has closed the connection."""


class Service:
    """What the endpoints share. Everything runs on one event loop but `deliver`, which the scheduler calls."""

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
        self.metrics = Metrics()
        self._key = None if api_key is None else api_key.encode()
        self._active: set[_Answer] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """Whose listener is `deliver`."""
        assert self._scheduler is not None, "attach a scheduler first"
        return self._scheduler

    @property
    def num_active(self) -> int:
        """Completions that are being answered."""
        return len(self._active)

    def attach(self, scheduler: Scheduler) -> None:
        """Takes the scheduler, which was made with `deliver` as its listener."""
        self._scheduler = scheduler
        gauge = self.metrics.gauge
        gauge("memjax_slots", "Texts that are written at a time.", lambda: scheduler.num_slots)
        gauge("memjax_slots_in_use", "Texts that are being written.", lambda: scheduler.num_running)
        gauge("memjax_queue_length", "Texts that wait for a slot.", lambda: scheduler.num_waiting)
        gauge("memjax_engine_failures", "Calls of the engine that failed.", lambda: scheduler.num_failures)

    def bind_loop(self) -> None:
        """Has updates handed out on the running event loop."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, updates: list[tuple[Ticket, Update]]) -> None:
        """Passes updates on to the event loop, from the scheduler's thread."""
        # A loop that is closed has no clients left.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hand_out, updates)

    def _hand_out(self, updates: list[tuple[Ticket, Update]]) -> None:
        self.metrics.add_tokens(sum(len(update.made.tokens) for _, update in updates))
        for ticket, update in updates:
            answer, choice = ticket.owner
            answer.inbox.put_nowait((choice, update))

    def check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Raises a RefusedError without the right key."""
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
        """Raises a RefusedError while the server ends."""
        if self.is_draining:
            raise RefusedError("the server is shutting down; try another one", status=503, headers={"Retry-After": "5"})

    def abort(self) -> None:
        """Ends every answer with an error."""
        for answer in self._active:
            for choice in answer.choices:
                answer.inbox.put_nowait((choice, Update(Made([]), error="the server is shutting down")))

    @contextlib.contextmanager
    def answering(self, request: CompletionRequest, choices: list[Choice]) -> Iterator["_Answer"]:
        """Submits the choices; those that are not done at the end lose their slots."""
        answer = _Answer(request, choices)
        for choice in choices:
            choice.ticket.owner = answer, choice
        self._active.add(answer)
        try:
            try:
                self.scheduler.submit([choice.ticket for choice in choices])
            except QueueFullError:
                raise self._queue_is_full() from None
            yield answer
        finally:
            self._active.discard(answer)
            for choice in choices:
                if not choice.is_done:
                    self.scheduler.cancel(choice.ticket)
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


class _Answer:
    """A completion in the making."""

    def __init__(self, request: CompletionRequest, choices: list[Choice]):
        self.request, self.choices = request, choices
        self.inbox: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()
        self.began = time.monotonic()
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def pieces(self, service: Service) -> AsyncIterator[tuple[Choice, Piece]]:
        """What becomes of the choices, until all are done.

        Raises:
            RefusedError: the engine failed.
        """
        is_first = True
        while not all(choice.is_done for choice in self.choices):
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
                # A stop string came, which the engine does not know of.
                service.scheduler.cancel(choice.ticket)
            if piece.text or piece.finish or (piece.logprobs and piece.logprobs["tokens"]):
                yield choice, piece

    def document(self, service: Service, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": service.model_name}
        return {**head, "choices": choices, **more}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all choices."""
        prompt = sum(len(one.ticket.request.prompt_ids) for one in self.choices[:: self.request.n])
        made = sum(choice.num_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


Endpoint = Callable[[Service, Request, Send], Coroutine[Any, Any, Response | None]]


class Endpoints:
    """The ASGI application: asks for the key, answers, makes answers of errors, and counts them."""

    def __init__(self, service: Service):
        self._service = service
        self._routes: dict[str, dict[str, Endpoint]] = {
            "/v1/completions": {"POST": _completions},
            "/v1/models": {"GET": _models},
            "/health": {"GET": _health},
            "/metrics": {"GET": _metrics},
            "/tokenizer_info": {"GET": _tokenizer_info},
            "/tokenize": {"POST": _tokenize},
            "/detokenize": {"POST": _detokenize},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        status = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                await self._answer(Request(scope, receive), noting)
            except RefusedError as error:
                await _refusal(error)(scope, receive, noting)
        except (HungUpError, ClientDisconnect):
            status = HUNG_UP
        except Exception:
            # The traceback is for uvicorn's log.
            if status is None:
                await _refusal(RefusedError("the server failed; its log says how", status=500))(scope, receive, noting)
            raise
        finally:
            self._service.metrics.codes[status or HUNG_UP] += 1

    async def _answer(self, request: Request, send: Send) -> None:
        path = request.scope["path"]
        if path != "/health":
            self._service.check_key(request.scope["headers"])
        name = path.removeprefix("/v1/models/")
        if name != path and name != self._service.model_name:
            raise _no_model(name, self._service)
        known = self._routes.get("/v1/models" if name != path else path)
        if known is None:
            paths = ", ".join(sorted(self._routes))
            raise RefusedError(f"there is nothing at {shown(path)}; there are {paths}", status=404)
        # The body of an answer to HEAD is left out by uvicorn.
        endpoint = known.get("GET" if request.method == "HEAD" else request.method)
        if endpoint is None:
            allowed = ", ".join(known)
            message = f"{path} takes {allowed}, not {shown(request.method)}"
            raise RefusedError(message, status=405, headers={"Allow": allowed})
        response = await endpoint(self._service, request, send)
        if response is not None:
            await response(request.scope, request.receive, send)


async def _completions(service: Service, request: Request, send: Send) -> Response | None:
    service.refuse_when_draining()
    body = parse_json(await _read_body(request, service.limits))
    limits = service.limits
    most = min(limits.max_choices, service.scheduler.max_waiting)
    asked = parse_request(body, vocab_size=service.vocab_size, max_choices=most)
    if asked.model is not None and asked.model != service.model_name:
        raise _no_model(asked.model, service)
    # A long text takes a while to encode.
    prompts = await asyncio.to_thread(prompt_ids, service.tokenizer, asked)
    choices = make_choices(service.tokenizer, asked, prompts, max_length=limits.max_length)
    service.metrics.prompt_tokens += sum(len(ids) for ids, _ in prompts)
    with service.answering(asked, choices) as answer:
        if asked.stream:
            await _until_hang_up(request, _stream(service, answer, send))
            return None
        return await _until_hang_up(request, _collect(service, answer))


async def _collect(service: Service, answer: _Answer) -> Response:
    found = [{"index": choice.index, "text": "", "logprobs": None, "finish_reason": None} for choice in answer.choices]
    async for choice, piece in answer.pieces(service):
        document = found[choice.index]
        document["text"] += piece.text
        document["finish_reason"] = piece.finish
        if piece.logprobs is not None:
            so_far = document["logprobs"] or {name: [] for name in piece.logprobs}
            document["logprobs"] = {name: so_far[name] + values for name, values in piece.logprobs.items()}
    return _json(answer.document(service, found, usage=answer.usage()))


async def _stream(service: Service, answer: _Answer, send: Send) -> None:
    """Server-sent events: one for every piece, then the usage if it is asked for, then `[DONE]`."""
    is_started = False
    usage = {"usage": None} if answer.request.include_usage else {}

    async def event(data: str) -> None:
        nonlocal is_started
        if not is_started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            is_started = True
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    try:
        async for choice, piece in answer.pieces(service):
            part = {
                "index": choice.index,
                "text": piece.text,
                "logprobs": piece.logprobs,
                "finish_reason": piece.finish,
            }
            await event(_dumps(answer.document(service, [part], **usage)))
        if usage:
            await event(_dumps(answer.document(service, [], usage=answer.usage())))
        await event("[DONE]")
    except RefusedError as error:
        if not is_started:
            raise
        await event(_dumps(error.document))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _models(service: Service, request: Request, send: Send) -> Response:
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "memjax",
        "max_model_len": service.limits.max_length,
    }
    return _json(model if request.scope["path"] != "/v1/models" else {"object": "list", "data": [model]})


async def _health(service: Service, request: Request, send: Send) -> Response:
    status = "draining" if service.is_draining else "ok" if service.scheduler.is_alive else "failed"
    return _json({"status": status}, status=200 if status == "ok" else 503)


async def _metrics(service: Service, request: Request, send: Send) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _tokenizer_info(service: Service, request: Request, send: Send) -> Response:
    tokenizer = service.tokenizer
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    tokens = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    special = {field: names.get(token) for field, token in tokens.items()}
    return _json({"tokenizer_class": type(tokenizer).__name__, **special})


async def _tokenize(service: Service, request: Request, send: Send) -> Response:
    body = parse_json(await _read_body(request, service.limits))
    text, adds = parse_tokenize(body)
    ids = await asyncio.to_thread(service.tokenizer.encode_with_special, text)
    ids = service.tokenizer.prompt(ids) if adds else ids
    return _json({"count": len(ids), "max_model_len": service.limits.max_length, "tokens": ids})


async def _detokenize(service: Service, request: Request, send: Send) -> Response:
    ids = parse_detokenize(parse_json(await _read_body(request, service.limits)), vocab_size=service.vocab_size)
    return _json({"prompt": await asyncio.to_thread(lambda: service.tokenizer.decode(ids, special=True))})


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: it is too long, comes too slowly, or is not said to be JSON.
        ClientDisconnect: the client has gone.
    """
    # A page in a browser may send any other type to a server on this machine without asking it first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = (
            f"Content-Type={shown(kind)} must be application/json; send the header 'Content-Type: application/json'"
        )
        raise RefusedError(message, status=415)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.max_body_bytes:
                    body += part
                elif size > _DISCARDED * limits.max_body_bytes:
                    break
    except TimeoutError:
        message = f"the body did not come within {limits.body_seconds:g} seconds"
        raise RefusedError(message, status=408, headers={"Connection": "close"}) from None
    if size > limits.max_body_bytes:
        message = (
            f"the body has more than the {limits.max_body_bytes:,} bytes that this server takes; send less at a time"
        )
        raise RefusedError(message, status=413, headers={"Connection": "close"})
    return bytes(body)


async def _until_hang_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, which is cancelled when the client hangs up.

    Raises:
        HungUpError: the client has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise HungUpError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _no_model(name: str, service: Service) -> RefusedError:
    message = f"model={shown(name)} is not served here; leave it out or write {shown(service.model_name)}"
    return RefusedError(message, status=404, param="model", code="model_not_found")


def _refusal(error: RefusedError) -> Response:
    # Parts of the request stand in the message, and need not be valid Unicode.
    return Response(
        json.dumps(error.document), status_code=error.status, headers=error.headers, media_type="application/json"
    )


def _json(document: Any, *, status: int = 200) -> Response:
    return Response(_dumps(document), status_code=status, media_type="application/json")


def _dumps(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits of time: for the head of a request, and for clients that read nothing."""

    head_seconds: float
    stall_seconds: float
    _head_due: asyncio.TimerHandle | None = None
    _read_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_due, self._read_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._head_due is not None and self.cycle is not None and not self.cycle.response_complete:
            self._head_due.cancel()
            self._head_due = None

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_due = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _expect_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
        self._head_due = self.loop.call_later(self.head_seconds, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone: they drain first."""
        yield


class HttpServer:
    """Serves an attached `Service` on a socket until it is told to drain."""

    def __init__(
        self, service: Service, listening: socket.socket, *, drain_seconds: float, max_connections: int = 1024
    ):
        self._service, self._socket, self._drain_seconds = service, listening, drain_seconds
        limits = service.limits
        times = {"head_seconds": limits.body_seconds, "stall_seconds": limits.stall_seconds}
        config = uvicorn.Config(
            Endpoints(service),
            http=type("Protocol", (_Protocol,), times),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=int(_SHUTDOWN_SECONDS),
        )
        self._uvicorn = _Uvicorn(config)
        self._draining: asyncio.Task[None] | None = None

    async def run(self, *, ready: Callable[[], None] = lambda: None, signals: Sequence[signal.Signals] = ()) -> None:
        """Serves until it has drained; then the scheduler has ended, too.

        Args:
            ready: is called when requests are accepted.
            signals: the first of them begins to drain, a second ends the process at once.
        """
        loop = asyncio.get_running_loop()
        self._service.bind_loop()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            ready()
        await serving
        ended = await asyncio.to_thread(self._service.scheduler.stop, _SHUTDOWN_SECONDS)
        if signals and not ended:
            # It compiles, say; nobody waits for what comes of it, and the interpreter cannot end around it.
            _exit_now(0)

    def drain(self) -> None:
        """Takes no more completions, lets those that run end up to the time limit, then ends; on the loop's thread."""
        if self._draining is None:
            self._service.is_draining = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        service, due = self._service, time.monotonic() + self._drain_seconds
        while service.num_active and time.monotonic() < due:
            await asyncio.sleep(0.02)
        service.abort()
        self._uvicorn.should_exit = True

    def _on_signal(self, number: signal.Signals) -> None:
        if self._draining is not None:
            _exit_now(128 + number)
        count, seconds = self._service.num_active, self._drain_seconds
        say(f"{number.name}: {count} running requests may end within {seconds:g} s; a second signal ends at once")
        self.drain()


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
