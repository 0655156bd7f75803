"""`python -m memjax.serve RUN`: a trained model behind OpenAI's HTTP interface."""

import asyncio
import dataclasses
import importlib.util
import ipaddress
import os
import pathlib
import signal
import socket
from collections.abc import Iterator, Sequence

from memjax.config.load import READ_RUN, parse
from memjax.config.section import NotEmpty, Positive
from memjax.errors import ConfigError
from memjax.io.command import exit_code
from memjax.io.console import say, warn
from memjax.io.ctrl_c import run_command
from memjax.monitoring.progress import Progress
from memjax.runs.settings import InferenceSettings, loaded

PROG = "python -m memjax.serve"
_PROGRESS_SECONDS = 5.0
"""Seconds between lines that report how many programs are compiled, if there is no terminal."""
_API_KEY = "MEMJAX_API_KEY"
_INSTALL = "pip install 'starlette>=1,<2' 'uvicorn>=0.50,<1'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(InferenceSettings):
    """Where to serve, and what clients may ask for."""

    host: NotEmpty[str] = "127.0.0.1"
    """The address to listen on; 0.0.0.0: all addresses of this machine. Anybody who reaches it can then use the model,
    unless the environment variable MEMJAX_API_KEY holds a key."""
    port: int = 8000
    """The port; 0: a free one, which is printed."""
    slots: Positive[int] = 16
    """Texts generated at once; others wait. Their cache is allocated at the start."""
    max_length: int | None = None
    """Most tokens in a prompt and its answer together; null: data.sequence_length."""
    queue: Positive[int] = 256
    """Texts that may wait for a slot; further requests are refused with 429."""
    max_body_kib: Positive[int] = 2048
    """Largest body of a request, in KiB."""
    model_name: NotEmpty[str] | None = None
    """The model's name for clients; null: that of the run's folder."""
    drain_seconds: float = 30.0
    """How long running requests may continue after SIGTERM or Ctrl-C."""
    reuse_prompts: bool = True
    """Copy the keys and values of a prefix that a prompt shares with another from the cache, instead of computing them
    again. In 16-bit types, this can tip the choice between two almost equally likely tokens."""
    warm_up: bool = True
    """Compile for all prompt lengths before the first request, and then for less usual ones (log-probabilities,
    penalties) in the background, rather than when they arrive."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.port < 1 << 16:
            yield f"port={self.port} must be in 0..65535"
        if not 0 <= self.drain_seconds < 1e6:
            yield f"drain_seconds={self.drain_seconds} must be in 0..1e6"
        if self.max_length is not None and self.max_length < 2:
            yield f"max_length={self.max_length} must be at least 2: a token of the prompt and one to generate"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal ends it; returns the exit code."""
    parsed = parse(
        ServeConfig,
        argv,
        prog=PROG,
        description="Serves a trained model to OpenAI clients: /v1/completions, /v1/models, /health and /metrics.",
        positional=READ_RUN,
        examples=[
            f"{PROG} runs/quickstart",
            f"{_API_KEY}=... {PROG} runs/quickstart --host 0.0.0.0 --port 8080 --slots 64",
        ],
    )
    return exit_code(lambda: _serve(str(parsed.positional), parsed.config))


def _serve(run: str, settings: ServeConfig) -> None:
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{PROG} needs {' and '.join(missing)}, which cannot be imported; {_INSTALL}")
    key = _api_key()
    # A bad address is reported before the model is loaded.
    with listen(settings.host, settings.port) as listening:
        address = listening.getsockname()
        if key is None and not ipaddress.ip_address(address[0]).is_loopback:
            warn(f"warning: anybody who reaches {address[0]} can use the model; set {_API_KEY} to require a key")
        with loaded(run, settings) as found:
            from memjax.inference.scheduler import Scheduler
            from memjax.inference.scoring import PromptScorer
            from memjax.inference.server import HttpServer
            from memjax.inference.service import Limits, Service
            from memjax.inference.serving_engine import ServingEngine, lower_rest, warm_up

            max_length = settings.max_length or found.config.data.sequence_length
            name = settings.model_name or pathlib.Path(run).resolve().name
            service = Service(
                found.tokenizer,
                vocab_size=found.model.config.vocab_size,
                model_name=name,
                limits=Limits(max_length=max_length, max_body_bytes=settings.max_body_kib << 10),
                api_key=key,
            )
            engine = ServingEngine(
                found.model,
                num_slots=settings.slots,
                max_length=max_length,
                reuse_prompts=settings.reuse_prompts,
            )
            step, score = found.step, PromptScorer(found.model)
            # The engine has its own weights.
            del found
            if settings.warm_up:
                say("compiling ...")
                with Progress(1, _PROGRESS_SECONDS) as shown:
                    show = lambda done, total: shown.update(done / total, f"compiled {done} of {total} programs")
                    warm_up(engine, max_length=max_length, progress=show)
            scheduler = Scheduler(engine, service.deliver, max_waiting=settings.queue, score=score)
            service.attach(scheduler)
            scheduler.start(lower_rest(engine, score, max_length=max_length) if settings.warm_up else ())
            server = HttpServer(service, listening, drain_seconds=settings.drain_seconds)
            url = f"http://{_url_host(address)}/v1"
            ready = lambda: say(_greeting(f"{name}, step {step:,}", url, has_key=key is not None))
            asyncio.run(server.run(ready=ready, signals=(signal.SIGTERM, signal.SIGINT)))
    say("ended")


def _api_key() -> str | None:
    key = os.environ.get(_API_KEY)
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        raise ConfigError(f"{_API_KEY} must hold a key without spaces around it; unset it to require none")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; connections are refused until it listens.

    Raises:
        ConfigError: the address is not one of this machine, or the port is taken or not permitted.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host={host} is not an address ({error}); 127.0.0.1 serves this machine only") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        why = error.strerror or str(error)
        raise ConfigError(f"host={host} and port={port} cannot be used ({why}); --port 0 takes a free port") from None
    return found


def _url_host(address: tuple) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _greeting(what: str, url: str, *, has_key: bool) -> str:
    key = f' -H "Authorization: Bearer ${_API_KEY}"' if has_key else ""
    body = """'{"prompt": "Once", "max_tokens": 32}'"""
    lines = [f"ready: {what}, at {url}", f"  curl {url}/completions -H 'Content-Type: application/json'{key} -d {body}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
