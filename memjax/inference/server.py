"""The HTTP server: uvicorn with timeouts for slow clients and a graceful shutdown."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from memjax.inference.endpoints import Endpoints
from memjax.inference.service import Service
from memjax.io.console import say

_SHUTDOWN_SECONDS = 5.0
"""Time for the last bytes of responses, and for the scheduler's threads to end."""
_SWITCH_SECONDS = 0.0005


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with time limits for the head of a request and for clients that stop reading."""

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
        """Leaves signals to `HttpServer`, which drains first."""
        yield


class HttpServer:
    """Serves a `Service` that has its scheduler on a socket, until drained."""

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
            timeout_graceful_shutdown=int(_SHUTDOWN_SECONDS),
        )
        self._uvicorn = _Uvicorn(config)
        service.is_crowded = lambda: len(self._uvicorn.server_state.connections) > max_connections
        self._draining: asyncio.Task[None] | None = None

    async def run(self, *, ready: Callable[[], None] = lambda: None, signals: Sequence[signal.Signals] = ()) -> None:
        """Serves until drained, then stops the scheduler.

        Args:
            ready: is called once requests are accepted.
            signals: the first one starts draining; a second ends the process at once.
        """
        # The thread that keeps the GPU busy must not wait 5 ms, Python's default, for this one to release the GIL.
        sys.setswitchinterval(_SWITCH_SECONDS)
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
            # A thread may be compiling: its result is not needed, and the interpreter cannot exit cleanly meanwhile.
            _exit_now(0)

    def drain(self) -> None:
        """Refuses new completions and shuts down when the running ones end or time is up; runs on the loop's thread."""
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
        say(f"{number.name}: waiting up to {seconds:g} s for running requests ({count}); a second signal ends at once")
        self.drain()


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
