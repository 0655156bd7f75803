"""OpenAI's HTTP interface as an ASGI application: paths, bodies, streams and errors.

The event loop validates requests, decodes tokens and detects disconnects; JAX runs only in the scheduler's thread.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from memjax.inference.bodies import RefusedError, parse_json, shown
from memjax.inference.choices import make_choices, prompt_ids
from memjax.inference.completions import parse_detokenize, parse_request, parse_tokenize
from memjax.inference.service import Answer, Limits, Service

T = TypeVar("T")

_HUNG_UP = 499
"""Status under which requests of disconnected clients are counted."""
_DISCARDED = 8
"""Bodies up to this multiple of the limit are read to the end, so that the client gets to read the refusal."""

_WHOLE_ADDRESS = re.compile("^https?://[^/]*", re.IGNORECASE)
_SHORT = 1000
"""Prompts of up to this many characters are encoded on the event loop."""


class HungUpError(Exception):
    """The client has closed the connection."""


Endpoint = Callable[[Service, Request, Send], Coroutine[Any, Any, Response | None]]


class Endpoints:
    """The ASGI application: checks the API key, routes requests, turns errors into responses, and counts responses."""

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
            status = _HUNG_UP
        except Exception:
            # Reraised for uvicorn to log.
            if status is None:
                await _refusal(RefusedError("the server failed; its log says why", status=500))(scope, receive, noting)
            raise
        finally:
            self._service.metrics.codes[status or _HUNG_UP] += 1

    async def _answer(self, request: Request, send: Send) -> None:
        # Clients of a proxy send the absolute URL (RFC 9112, 3.2.2).
        path = request.scope["path"] = _WHOLE_ADDRESS.sub("", request.scope["path"]) or "/"
        if path != "/health":
            self._service.check_key(request.scope["headers"])
            self._service.refuse_when_crowded()
        name = path.removeprefix("/v1/models/")
        if name not in ("", path, self._service.model_name):
            raise _no_model(name, self._service)
        known = self._routes.get("/v1/models" if name == self._service.model_name else path)
        if known is None:
            paths = ", ".join(sorted(self._routes))
            raise RefusedError(f"{shown(path)} does not exist; the endpoints are {paths}", status=404)
        # uvicorn omits the body of responses to HEAD.
        endpoint = known.get("GET" if request.method == "HEAD" else request.method)
        if endpoint is None:
            allowed = ", ".join(known)
            message = f"{path} accepts {allowed}, not {shown(request.method)}"
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
    encode = partial(prompt_ids, service.tokenizer, asked)
    letters = sum(len(prompt) for prompt in asked.prompts if isinstance(prompt, str))
    # Encoding a long text would block the loop; for a short one a thread costs more than the encoding.
    prompts = await asyncio.to_thread(encode) if letters > _SHORT else encode()
    choices = make_choices(service.tokenizer, asked, prompts, max_length=limits.max_length)
    with service.answering(asked, choices) as answer:
        if asked.stream:
            await _until_hang_up(request, _stream(service, answer, send))
            return None
        return await _until_hang_up(request, _collect(service, answer))


async def _collect(service: Service, answer: Answer) -> Response:
    found = [{"index": choice.index, "text": "", "logprobs": None, "finish_reason": None} for choice in answer.choices]
    async for choice, piece in answer.pieces(service):
        document = found[choice.index]
        document["text"] += piece.text
        document["finish_reason"] = piece.finish
        if piece.logprobs is not None:
            so_far = document["logprobs"] or {name: [] for name in piece.logprobs}
            document["logprobs"] = {name: so_far[name] + values for name, values in piece.logprobs.items()}
    return _json(answer.document(service, found, usage=answer.usage()))


async def _stream(service: Service, answer: Answer, send: Send) -> None:
    """Sends server-sent events: one per piece, then the usage if requested, then `[DONE]`."""
    is_started = False
    usage = {"usage": None} if answer.request.include_usage else {}

    async def write(text: str, *, more: bool) -> None:
        nonlocal is_started
        if not is_started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            is_started = True
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    text = ""
    try:
        async for choice, piece in answer.pieces(service):
            part = {
                "index": choice.index,
                "text": piece.text,
                "logprobs": piece.logprobs,
                "finish_reason": piece.finish,
            }
            text += _event(_dumps(answer.document(service, [part], **usage)))
            if not answer.is_done:
                await write(text, more=True)
                text = ""
        # The last piece and the end are sent together.
        if usage:
            text += _event(_dumps(answer.document(service, [], usage=answer.usage())))
        text += _event("[DONE]")
    except RefusedError as error:
        if not is_started:
            raise
        text += _event(_dumps(error.document))
    await write(text, more=False)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _models(service: Service, request: Request, send: Send) -> Response:
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "memjax",
        "max_model_len": service.limits.max_length,
    }
    is_list = request.scope["path"] == "/v1/models"
    return _json({"object": "list", "data": [model]} if is_list else model)


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
        RefusedError: the body is too large, arrives too slowly, is compressed or not declared as JSON.
        ClientDisconnect: the client has disconnected.
    """
    # A web page can send simple content types to local servers without a CORS preflight request.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = (
            f"Content-Type={shown(kind)} must be application/json; send the header 'Content-Type: application/json'"
        )
        raise RefusedError(message, status=415)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        message = f"Content-Encoding={shown(encoding)} is not served; leave it out and send the body uncompressed"
        raise RefusedError(message, status=415, headers={"Accept-Encoding": "identity"})
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
            f"the body has more than the {limits.max_body_bytes:,} bytes that this server accepts; send less at a time"
        )
        raise RefusedError(message, status=413, headers={"Connection": "close"})
    return bytes(body)


async def _until_hang_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, and cancels it when the client hangs up.

    Raises:
        HungUpError: the client has disconnected.
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
    # The message quotes the request, which may hold lone surrogates, so non-ASCII characters are escaped.
    return Response(
        json.dumps(error.document), status_code=error.status, headers=error.headers, media_type="application/json"
    )


def _json(document: Any, *, status: int = 200) -> Response:
    return Response(_dumps(document), status_code=status, media_type="application/json")


_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
