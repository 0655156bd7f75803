"""Timing on a device: medians over many calls on rotating inputs, index distributions, copy bandwidth, and records."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.io.files import write_atomic

DISTRIBUTIONS = ("uniform", "zipf", "equal")


def median_ms(
    function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], *, rounds: int = 15, calls: int = 10
) -> float:
    """Milliseconds per call: the median over rounds of several calls on rotating inputs, with one wait at the end.

    The calls of a round are queued, so that launching them costs nothing while the device is busy.
    """
    jax.block_until_ready([function(*arguments) for arguments in inputs])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = [function(*inputs[call % len(inputs)]) for call in range(calls)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
        del out
    return statistics.median(times)


def median_ms_in_place(
    function: Callable[..., Any], state: Any, inputs: Sequence[tuple[Any, ...]], *, rounds: int = 15, calls: int = 10
) -> tuple[float, Any]:
    """Like `median_ms`, for a function that donates and returns its first argument; also returns the last state."""
    for arguments in inputs:
        state = jax.block_until_ready(function(state, *arguments))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for call in range(calls):
            state = function(state, *inputs[call % len(inputs)])
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times), state


def copy_bandwidth(num_bytes: int) -> dict[str, float]:
    """Bytes read and written per second when copying num_bytes on the device, by method."""
    source = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    inputs = [(source, jnp.uint32(number)) for number in range(2)]
    milliseconds = {"XLA's a + 1": median_ms(jax.jit(lambda array, one: array + one), inputs, calls=20)}
    milliseconds["jnp.copy"] = median_ms(jax.jit(lambda array, _: jnp.copy(array)), inputs, calls=20)
    del source, inputs
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            from_here = torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda").random_()
            to_here = torch.empty_like(from_here)
            milliseconds["torch copy_"] = median_cuda_ms(lambda: to_here.copy_(from_here))
            del from_here, to_here
            torch.cuda.empty_cache()
    return {way: 2 * num_bytes / time * 1e3 for way, time in milliseconds.items()}


def median_cuda_ms(function: Callable[[], Any], *, rounds: int = 15, calls: int = 5) -> float:
    """Milliseconds per call that queues PyTorch work, by device events: the median over rounds of several calls."""
    import torch

    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def draw_indices(distribution: str, num_rows: int, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Row indices: uniform; Zipf, p(rank r) ~ (r + 1) ** -1.1 with rows permuted; or one row for all."""
    rng = np.random.default_rng(seed)
    if distribution == "equal":
        return jnp.full(shape, num_rows // 3, jnp.int32)
    if distribution == "uniform":
        return jnp.asarray(rng.integers(0, num_rows, shape), jnp.int32)
    cumulative = np.cumsum((np.arange(num_rows) + 1.0) ** -1.1)
    ranks = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return jnp.asarray(np.random.default_rng(0).permutation(num_rows)[np.minimum(ranks, num_rows - 1)], jnp.int32)


def environment() -> dict[str, Any]:
    """Device, package versions, commit and date."""
    versions: dict[str, str | None] = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
    }
    for name in ("triton", "jax-triton", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": versions,
        "commit": git("rev-parse", "--verify", "-q", "HEAD") or os.environ.get("COMMIT"),
        "date": datetime.date.today().isoformat(),
    }


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement's row, or a row with its error."""
    try:
        return function()
    except Exception as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            return {"note": "out of memory"}
        print(f"{type(error).__name__}: {text[:4000]}", file=sys.stderr, flush=True)
        return {"note": f"{type(error).__name__}: {' '.join(text.split())[:200]}"}


def stem(bench: str, *, small: bool) -> str:
    """File name, without suffix, of a benchmark on this device."""
    return f"{bench}-{jax.devices()[0].device_kind.replace(' ', '-').lower()}" + ("-small" if small else "")


def write_report(
    out: pathlib.Path, stem: str, record: dict[str, Any], columns: Sequence[str], *, title: str, note: str
) -> None:
    """Writes the record as JSON, and its rows as a table below a title and a note."""
    write_record(out / f"{stem}.json", record)
    text = f"# {title} on one {record['device']}\n\n{note}\n\n{table(record['rows'], columns)}\n"
    write_atomic(out / f"{stem}.md", text)


def write_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes the record as JSON."""
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def filled(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """The columns for which at least one row has a value."""
    return [column for column in columns if any(row.get(column) is not None for row in rows)]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table."""
    show = lambda value: "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(show(row.get(column)) for column in columns)} |" for row in rows])
