"""Benchmarks the server with clients that stream over HTTP and hang up at random, against the engine alone.

    python experiments/bench/serving.py                  # 373m Memory+, random weights, 64 clients x 20 requests
    python experiments/bench/serving.py --small          # on a CPU: a small model in float32

The server runs in its own process. Before serving, it times its engine alone on the same work: as many prompts as there
are clients, processed and completed together, several times. Then each client sends one request after another; a share
hangs up after part of the text. Clients are spread over several processes, as one cannot keep up with the server.
Afterwards, a sample of the requests is repeated one by one, and the answers are compared.
All generated tokens count, including those for clients that had hung up; the steady rate is measured until the first
client has sent all its requests, after which slots stay empty. The exit code is 1 if an answer is lost or differs (in
float32; in bfloat16, the share of equal answers is reported).
"""

import argparse
import asyncio
import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cases
import timing
from train_step import SMALL, SMALL_MEMORY

COLUMNS = (
    "model",
    "clients",
    "prompt",
    "new",
    "hang_ups",
    "tokens/s",
    "engine tokens/s",
    "of engine",
    "decoding tokens/s",
    "steady tokens/s",
    "steady of engine",
    "first token p50 ms",
    "first token p95 ms",
    "answers",
    "hung up",
    "lost",
    "equal",
    "peak GB",
    "RSS grown MB",
)
KEY = ("model", "clients", "prompt", "new", "hang_ups")
_SAMPLE = 24
"""Number of requests that are repeated."""
_START_SECONDS = 120.0
"""Time for the client processes to start."""


def serve(case: cases.Row) -> None:
    """Times the engine, then serves until SIGTERM; prints a line of JSON when ready, and one at the end."""
    import jax
    import numpy as np
    from random_table import random_model

    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.data.tokenizers.base import Tokenizer
    from memjax.inference.engine import Engine
    from memjax.inference.programs import LONGEST_CHUNK
    from memjax.inference.requests import Request
    from memjax.inference.scheduler import Scheduler
    from memjax.inference.scoring import PromptScorer
    from memjax.inference.server import HttpServer
    from memjax.inference.service import Limits, Service
    from memjax.inference.serving_engine import ServingEngine, lower_rest, warm_up
    from memjax.models.parts import DecoderParts

    class Numbers(Tokenizer):
        """Tokens whose text is their id."""

        kind = "numbers"
        encode = encode_batch = to_state = None  # pyright: ignore  # only ids are sent

    Numbers.__abstractmethods__ = frozenset()
    config = load(RunConfig, pathlib.Path(case["preset"]), case["settings"]).model
    model = random_model(DecoderParts.of(config), case["table_format"], case["table_place"])
    tokenizer = Numbers([f" {token}".encode() for token in range(config.vocab_size)], {"<pad>": 0}, bos_id=1, eos_id=2)
    max_length, clients, new = case["prompt"] + case["new"], case["clients"], case["new"]
    rng = np.random.default_rng(0)

    def alone(engine: Engine) -> tuple[float, float]:
        """Tokens per second of a batch, and of its decoding alone."""
        prompts = rng.integers(3, config.vocab_size, size=(clients, case["prompt"])).tolist()
        started = time.perf_counter()
        engine.insert([Request(prompt_ids=prompt, max_tokens=new) for prompt in prompts])
        engine.step(0)
        first = time.perf_counter()
        while engine.is_busy:
            engine.step(LONGEST_CHUNK)
        ended = time.perf_counter()
        return clients * new / (ended - started), clients * (new - 1) / (ended - first)

    engine = ServingEngine(model, num_slots=clients, max_length=max_length, reuse_prompts=case["reuse"])
    for _ in range(2):
        # The first batch compiles, and the second warms up memory.
        alone(engine)
    whole, decoding = zip(*[alone(engine) for _ in range(case["rounds"])], strict=True)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    limits = Limits(max_length=max_length)
    service = Service(tokenizer, vocab_size=config.vocab_size, model_name="bench", limits=limits)
    warm_up(engine, max_length=max_length, lengths=[case["prompt"]])
    for program in lower_rest(engine, PromptScorer(model), max_length=max_length):
        if engine.prompts.is_used or not (case["shared"] and case["reuse"]):
            break
        program.compile()
    scheduler = Scheduler(engine, service.deliver, max_waiting=4 * clients)
    service.attach(scheduler)
    scheduler.start()
    server = HttpServer(service, listening, drain_seconds=10.0)

    def ready() -> None:
        row = {"port": listening.getsockname()[1], "RSS": resident(), "dtype": str(model.embed.dtype)}
        row |= {"engine tokens/s": statistics.median(whole), "decoding tokens/s": statistics.median(decoding)}
        print(json.dumps(row), flush=True)

    asyncio.run(server.run(ready=ready, signals=(signal.SIGTERM,)))
    stats = jax.devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"] / 1e9 if stats else None
    print(json.dumps({"peak GB": peak, "RSS": resident(), "environment": timing.environment()}), flush=True)


def resident() -> float:
    """Resident memory of this process in megabytes."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Answer(NamedTuple):
    """The answer to a request."""

    text: str = ""
    finish: str | None = None
    """Reason why the text ended."""
    first: float | None = None
    """Seconds to the first token."""
    num_tokens: int = 0
    """As reported by the server, since special tokens have no text."""


async def ask(port: int, body: dict[str, Any], *, events: int | None = None) -> Answer:
    """Streams a completion, or only its first events."""
    options = {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    raw = json.dumps({**body, **options}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    text, finish, first, seen, num_tokens = [], None, None, 0, 0
    try:
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        async for line in reader:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                document = json.loads(line[6:])
                if document["usage"] is not None:
                    num_tokens = document["usage"]["completion_tokens"]
                    continue
                (choice,) = document["choices"]
                text.append(choice["text"])
                finish = choice["finish_reason"] or finish
                seen += 1
                if seen == events:
                    break
    finally:
        writer.close()
    return Answer("".join(text), finish, first, num_tokens)


async def made_tokens(port: int) -> int:
    """Number of tokens that the server has generated so far."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return int(text.rpartition("\nmemjax_generated_tokens_total ")[2].split("\n")[0])


class Load(NamedTuple):
    """Results of the clients of one process."""

    answers: list[tuple[dict[str, Any], str]]
    """Requests that were not hung up, and their texts."""
    firsts: list[float]
    """Seconds to the first token."""
    lost: int
    first_end: tuple[float, int]
    """When the first client had finished all its requests, and how many tokens the server had generated by then."""


class Client(NamedTuple):
    """The requests of a client."""

    bodies: list[dict[str, Any]]
    patience: list[int | None]
    """Number of events after which it hangs up; None: never."""


def plan(case: cases.Row, rng: random.Random) -> list[Client]:
    """The requests of each client."""
    length = case["prompt"] - 1  # the server adds the BOS token

    draw = lambda source, count: [source.randrange(3, case["vocab_size"]) for _ in range(count)]
    shared = draw(random.Random(2), min(case["shared"], length - 1))

    def request(number: int) -> dict[str, Any]:
        prompt = shared + draw(rng, length - len(shared))
        return {"prompt": prompt, "max_tokens": case["new"], "temperature": float(number % 2), "seed": number}

    numbers = range(case["requests"])
    return [
        Client(
            [request(place * len(numbers) + number) for number in numbers],
            [rng.randrange(1, 8) if rng.random() < case["hang_ups"] else None for _ in numbers],
        )
        for place in range(case["clients"])
    ]


async def run_clients(port: int, clients: Sequence[Client], num_tokens: int) -> Load:
    """Runs clients concurrently; each sends one request after another."""
    answers: list[tuple[dict[str, Any], str]] = []
    firsts: list[float] = []
    lost, has_ended, first_end = 0, False, (0.0, 0)

    async def run(client: Client) -> None:
        nonlocal lost, has_ended, first_end
        for body, patience in zip(*client, strict=True):
            try:
                answer = await ask(port, body, events=patience)
            except OSError:
                answer = Answer()
            if answer.first is not None:
                firsts.append(answer.first)
            if patience is None:
                is_whole = answer.finish == "length" and answer.num_tokens == num_tokens
                lost += not is_whole
                answers.append((body, answer.text))
        if not has_ended:
            has_ended = True  # set first, as others may arrive here during the await
            made = await made_tokens(port)
            first_end = time.perf_counter(), made

    await asyncio.gather(*map(run, clients))
    return Load(answers, firsts, lost, first_end)


def run_process(port: int, clients: Sequence[Client], num_tokens: int, barrier: threading.Barrier) -> Load:
    """Runs the clients of one process, which start together with those of the others."""
    barrier.wait(_START_SECONDS)
    return asyncio.run(run_clients(port, clients, num_tokens))


def load_server(case: cases.Row, port: int) -> cases.Row:
    """Sends all requests, then repeats a sample of them."""
    rng = random.Random(0)
    clients, num_processes = plan(case, rng), min(case["clients"], case["processes"])
    # The very first requests compile the remaining programs.
    warm = plan({**case, "clients": 1, "requests": 2, "hang_ups": 0.0}, random.Random(1))
    asyncio.run(run_clients(port, warm, case["new"]))
    with (
        multiprocessing.get_context("spawn").Manager() as manager,
        concurrent.futures.ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool,
    ):
        barrier: Any = manager.Barrier(num_processes + 1)
        shares = [clients[place::num_processes] for place in range(num_processes)]
        futures = [pool.submit(run_process, port, share, case["new"], barrier) for share in shares]
        before = asyncio.run(made_tokens(port))
        barrier.wait(_START_SECONDS)
        started = time.perf_counter()
        loads = [future.result() for future in futures]
        seconds = time.perf_counter() - started
    made = asyncio.run(made_tokens(port)) - before
    answers = [answer for load in loads for answer in load.answers]
    first_end, made_then = min(load.first_end for load in loads)
    again = rng.sample(answers, min(_SAMPLE, len(answers)))
    equal = [text == asyncio.run(ask(port, body)).text for body, text in again]
    firsts = [first for load in loads for first in load.firsts]
    return {
        "tokens/s": made / seconds,
        "steady tokens/s": (made_then - before) / (first_end - started),
        "first token p50 ms": statistics.median(firsts) * 1e3,
        "first token p95 ms": statistics.quantiles(firsts, n=20)[18] * 1e3,
        "answers": len(answers),
        "hung up": sum(patience is not None for client in clients for patience in client.patience),
        "lost": sum(load.lost for load in loads),
        "equal": f"{sum(equal)} of {len(equal)}",
        "all equal": all(equal),
    }


def measure(case: cases.Row) -> cases.Row:
    """Starts the server, puts it under load, and stops it."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--serve", json.dumps(case)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = functools.partial(next, (json.loads(line) for line in process.stdout if line.startswith("{")), None)
    try:
        ready = lines()
        if ready is None:
            return {"note": f"the server ended with {process.wait()}"}
        row = load_server(case, ready["port"])
        process.send_signal(signal.SIGTERM)
        end = lines() or {"peak GB": None, "RSS": ready["RSS"], "environment": {}}
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    row |= {name: ready[name] for name in ("engine tokens/s", "decoding tokens/s", "dtype")}
    for rate, share in (("tokens/s", "of engine"), ("steady tokens/s", "steady of engine")):
        row[share] = row[rate] / row["engine tokens/s"]
    row |= {"peak GB": end["peak GB"], "RSS grown MB": end["RSS"] - ready["RSS"], "environment": end["environment"]}
    return row


def main() -> int:
    parser = cases.parser(__doc__, small="a small model and few requests")
    parser.add_argument("--size", default="373m", help="preset configs/SIZE_memory_plus_1m.yaml")
    parser.add_argument("--dtype", default="bfloat16", help="of parameters; float32 for equal answers")
    parser.add_argument("--table_format", help="of a table of random codes, such as int8")
    parser.add_argument("--table_place", default="device", choices=("device", "host"), help="where that table lives")
    parser.add_argument("--clients", type=int, help="as many slots; 64, or 4 if small")
    parser.add_argument("--requests", type=int, help="of each client; 20, or 3 if small")
    parser.add_argument("--prompt", type=int, help="tokens; 512, or 16 if small")
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with, as with examples")
    parser.add_argument("--read_all", action="store_true", help="read prompts whole, rather than reuse what is shared")
    parser.add_argument("--new", type=int, help="tokens of an answer; 128, or 16 if small")
    parser.add_argument("--hang_ups", type=float, default=0.15, help="share of requests whose client hangs up")
    parser.add_argument("--processes", type=int, help="that the clients share; half of the CPU's cores")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return 0
    small = arguments.small
    defaults = {"clients": (64, 4), "requests": (20, 3), "prompt": (512, 16), "new": (128, 16)}
    case: cases.Row = {name: getattr(arguments, name) or both[small] for name, both in defaults.items()}
    dtype = "float32" if small else arguments.dtype
    words = [*SMALL.split(), *SMALL_MEMORY.split(), "--model.memory.num_keys", "16"] if small else []
    words += ["--model.param_dtype", dtype, "--model.dtype", dtype]
    preset = cases.ROOT / f"configs/{arguments.size}_memory_plus_1m.yaml"

    from memjax.config.load import load
    from memjax.config.run import RunConfig

    vocab_size = load(RunConfig, preset, words).model.vocab_size
    case |= {"preset": str(preset), "settings": words, "vocab_size": vocab_size}
    case |= {name: getattr(arguments, name) for name in ("table_format", "table_place")}
    processes = arguments.processes or max(1, (os.cpu_count() or 2) // 2)
    case |= {"shared": arguments.shared, "reuse": not arguments.read_all}
    case |= {"hang_ups": arguments.hang_ups, "processes": processes, "rounds": 1 if small else 3}
    table = f", table {arguments.table_format}, {arguments.table_place}" if arguments.table_format else ""
    shared = f", {arguments.shared} tokens shared" + ", read again" * arguments.read_all if arguments.shared else ""
    row: cases.Row = {"model": f"Memory+ {'small' if small else arguments.size}, {dtype}{table}{shared}"}
    row |= {name: case[name] for name in ("clients", "prompt", "new", "hang_ups")} | measure(case)
    environment: cases.Row = row.pop("environment", {})
    record = {"command": cases.command("serving", arguments), **environment, "rows": [row]}
    stem = cases.stem("serving", arguments, record)
    cases.write(arguments.out.resolve(), stem, record, title="Serving on", columns=COLUMNS, key=KEY)
    print(timing.table([row], COLUMNS), flush=True)
    is_wrong = "note" in row or row["lost"] or (dtype == "float32" and not row["all equal"])
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
