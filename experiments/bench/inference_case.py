"""Measures generation by one model, or parts of it alone, in its own process: `inference_case.py CASE RESULT`.

Started by inference.py.
"""

import contextlib
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memjax
from memjax.config.load import load
from memjax.config.memory import MemoryConfig
from memjax.config.run import RunConfig
from memjax.inference.engine import Engine
from memjax.inference.requests import Request
from memjax.inference.streaming import Pace
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts
from memjax.monitoring.profile import newest_trace, operations, table
from memjax.ops import dispatch, tiles
from memjax.ops.decode_attention.api import decode_step
from memjax.ops.product_key_search.api import weighted_search
from memjax.ops.row_formats import formats
from memjax.ops.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import cases
import timing
from random_table import random_model

Row = dict[str, Any]


def measure(model: Decoder, case: Row, batch: int, length: int) -> Row:
    """The time to the first token of `batch` prompts, and of each further token: medians over texts."""
    vocab_size = model.config.vocab_size
    engine = Engine(model, num_slots=batch, prefill_rows=batch)

    def insert(seed: int, new: int) -> None:
        prompts = np.random.default_rng(seed).integers(3, vocab_size, size=(batch, length)).tolist()
        engine.insert([Request(prompt_ids=prompt, max_tokens=new) for prompt in prompts])

    def steady(seed: int) -> tuple[float, float]:
        """Decodes like a server: chunks of equal length, timed once the prompts are in the cache."""
        started = time.perf_counter()
        insert(seed, 1 + chunk + case["new"])
        engine.step(0)
        first = time.perf_counter()
        engine.step(chunk)
        began = time.perf_counter()
        while engine.is_busy:
            engine.step(chunk)
        return first - started, (time.perf_counter() - began) / case["new"]

    def streamed(seed: int) -> float:
        """Decodes like a stream: from the first token on, one, two, four, ... tokens at a time."""
        insert(seed, 1 + case["new"])
        engine.step(0)
        began, pace = time.perf_counter(), Pace()
        while engine.is_busy:
            pace.step(engine)
        return (time.perf_counter() - began) / case["new"]

    chunk, rounds = case["chunk"], range(2, 2 + case["rounds"])
    started = time.perf_counter()
    steady(0)
    compile_seconds = time.perf_counter() - started
    streamed(1)
    firsts, others = zip(*map(steady, rounds), strict=True)
    milliseconds = statistics.median(others) * 1e3
    stats = jax.devices()[0].memory_stats()
    row = {
        "first token ms": statistics.median(firsts) * 1e3,
        "ms a token": milliseconds,
        "streamed ms": statistics.median(map(streamed, rounds)) * 1e3,
        "tokens/s": round(batch / milliseconds * 1e3),
        "compile s": compile_seconds,
        "peak GB": stats["peak_bytes_in_use"] / 1e9 if stats else None,
        "decode attention": dispatch.choose("decode_attention", None, jnp.dtype(model.embed.dtype)),
    }
    if case["profile"]:
        folder = pathlib.Path(case["profile"]) / f"{batch}x{length}"
        insert(1, 1 + chunk + case["new"])
        engine.step(1)
        with jax.profiler.trace(str(folder)):
            engine.step(chunk)
        trace = jax.profiler.ProfileData.from_file(str(newest_trace(folder)))
        row["profile"] = table(operations(trace), 24)
        print(row["profile"], file=sys.stderr, flush=True)
    return row


def of_engine(case: Row) -> Iterator[Row]:
    """A row for every batch size and prompt length."""
    config = load(RunConfig, pathlib.Path(case["preset"]), case["settings"]).model
    model = random_model(DecoderParts.of(config), case.get("format"), case.get("place"))
    for batch, length in case["sizes"]:
        yield {"batch": batch, "prompt": length} | timing.attempt(lambda: measure(model, case, batch, length))  # noqa: B023


def of_attention(case: Row) -> Iterator[Row]:
    """Decode attention over caches filled to the prompt length, with every implementation and tile."""
    dtype = jnp.float32 if case["small"] else jnp.bfloat16
    runs: dict[str, Callable[..., Any]] = {
        name: partial(decode_step, rotation=None, implementation=name) for name in ("triton", "xla")
    }
    if dispatch.why_not("triton", dtype) is None:
        kernels = dispatch.load("decode_attention", "triton")
        for programs, (block, num_warps), num_stages in itertools.product(
            (512, 1024), ((32, 2), (32, 4), (64, 2), (64, 4)), (2, 3, 4)
        ):
            tile = kernels.Tile(programs, block, num_warps, num_stages)
            name = f"triton {programs} {block}/{num_warps}/{num_stages}"
            runs[name] = partial(kernels.decode_step, rotation=None, window=None, tile=tile)
    for (batch, length), (name, run) in itertools.product(case["sizes"], runs.items()):
        found = {"model": f"decode attention, {name}", "batch": batch, "prompt": length}
        yield found | timing.attempt(lambda: attention_row(case, batch, length, run, dtype))  # noqa: B023


def attention_row(case: Row, batch: int, length: int, step: Callable[..., Any], dtype: Any) -> Row:
    """One layer's attention for one token, with a cache of twice the length that is half full."""
    keys, heads = jax.random.split(jax.random.key(0), 3), case["heads"]
    cache = [jax.random.normal(key, (batch, heads, 2 * length, case["width"]), dtype) for key in keys[:2]]
    joined = jax.random.normal(keys[2], (batch, 3 * heads * case["width"]), dtype)
    positions = jnp.full(batch, length - 1, jnp.int32)
    # Many calls in one program, like the layers of a model: one call takes no longer than its launch, and the cache is
    # copied before the first.
    calls = 64

    def chain(positions: Any, *arrays: Any) -> Any:
        def call(_: Any, arrays: Any) -> Any:
            out, *cache = step(*arrays, positions)
            return arrays[0].at[:, : out[0].size].set(out.reshape(batch, -1)), *cache

        return jax.lax.fori_loop(0, calls, call, arrays)

    inputs = [(positions, joined, *cache)]
    milliseconds = timing.median_ms(jax.jit(chain), inputs, rounds=case["rounds"], calls=4) / calls
    filled = 2 * batch * length * case["heads"] * case["width"] * jnp.dtype(dtype).itemsize
    return {"ms a token": milliseconds, "note": f"{filled / milliseconds / 1e6:.0f} GB/s of what is filled"}


def of_lookup(case: Row) -> Iterator[Row]:
    """Search, weights and bag of few tokens: the existing forms, then tiles that might be better."""
    model = load(RunConfig, pathlib.Path(case["preset"]), case["settings"]).model
    memory, tables = model.memory, [(4096, "bfloat16"), (1024, "bfloat16"), (1024, "int8"), (1024, "int4")]
    assert memory is not None
    if case["small"]:
        tables = [(16, "int8")]
    for variants in (lookup_forms,) if case["small"] else (lookup_forms, lookup_tiles):
        for num_keys, table_format in tables:
            for tokens in case["sizes"]:
                inputs = inputs_of_lookup(memory, memory.width(model.dim), num_keys, table_format, tokens)
                for variant, tried in variants(num_keys, table_format).items():
                    name = f"lookup, {num_keys**2:,} slots, {table_format}, {variant}"
                    found = timing.attempt(lambda: lookup_row(inputs, memory.top_k, tried, case["rounds"]))  # noqa: B023
                    yield {"model": name, "batch": tokens} | found
                del inputs


def lookup_forms(num_keys: int, table_format: str) -> dict[str, dict[str, Row]]:
    """The form used for few tokens, and the one for many, as tile fields by operation."""
    sorted_pairs = {"pair_few": {"by_rank": 0, "num_warps": 1}}
    return {"as it is": {}, "pairs sorted": sorted_pairs}


def lookup_tiles(num_keys: int, table_format: str) -> dict[str, dict[str, Row]]:
    """Other tiles: of the search for plain tables, of the bag for quantised ones."""
    found: dict[str, dict[str, Row]] = {}
    tried = ((128, 2), (128, 4), (128, 8), (256, 2), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 8))
    for rows, num_warps in tried if table_format == "bfloat16" else ():
        if 4 * rows <= num_keys:
            cut: Row = {"rows": rows, "num_warps": num_warps}
            found[f"select {cut}"] = {_select(num_keys): cut}
    for rows, columns, num_warps in ((128, 128, 8), (64, 64, 4), (128, 32, 4), (64, 128, 4)) if num_keys < 4096 else ():
        cut = {"rows": rows, "columns": columns, "num_warps": num_warps}
        found[f"bag {cut}"] = {"embedding_bag_few": cut}
    return found


def _select(num_keys: int) -> str:
    return "select_long_few" if num_keys > 2048 else "select_few"


def inputs_of_lookup(
    memory: MemoryConfig, width: int, num_keys: int, table_format: str, tokens: int
) -> tuple[Any, ...]:
    """Queries and keys of several layers, too many for the GPU's cache, and a table of zeros: values do not matter."""
    layers, half, seeds = 6, memory.key_dim // 2, jax.random.split(jax.random.key(0), 2)
    queries = jax.random.normal(seeds[0], (layers, tokens, memory.num_heads, 2 * half), jnp.bfloat16)
    keys = jax.random.normal(seeds[1], (layers, memory.num_heads, 2, num_keys, half), jnp.bfloat16)
    row_format = formats.find(table_format)
    groups, shape = row_format.groups(width), (num_keys**2, row_format.payload_columns(width))
    scales = jnp.ones((num_keys**2, groups), formats.SCALE_DTYPE) if groups else None
    rows = jnp.zeros(shape, row_format.payload_dtype)
    return list(queries), list(keys), Table(rows, scales, format=row_format, value_dtype="bfloat16")


def lookup_row(inputs: tuple[Any, ...], top_k: int, tried: dict[str, Row], rounds: int) -> Row:
    """Time of a lookup; each depends on the bag of the one before."""
    # In a loop, arrays stay in place, and the body is launched as one graph.
    layers, times = len(inputs[0]), 16

    def chain(bag: Any, queries: list[Any], keys: list[Any], table: Table) -> Any:
        for query, key in zip(queries, keys, strict=True):
            weights, slots = weighted_search(query + bag, key, top_k, scale=1.0)
            slots, weights = slots.reshape(len(query), -1), weights.reshape(len(query), -1)
            read = memjax.embedding_bag(table, slots, weights, mode="promise_in_bounds")
            bag = read[:, None, : query.shape[2]]
        return bag

    def run(queries: list[Any], keys: list[Any], table: Table) -> Any:
        bag = jnp.zeros((len(queries[0]), 1, queries[0].shape[2]), jnp.bfloat16)
        return jax.lax.fori_loop(0, times, lambda _, bag: chain(bag, queries, keys, table), bag)

    with contextlib.ExitStack() as stack:
        for operation, fields in tried.items():
            stack.enter_context(tiles.override(operation, **fields))
        milliseconds = timing.median_ms(jax.jit(run), [inputs], rounds=rounds, calls=2) / layers / times
    return {"ms a token": milliseconds, "note": f"{milliseconds * 1e3:.2f} microseconds"}


def main() -> None:
    """Writes the case's rows as JSON, and prints each."""
    case, result = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    rows = {"engine": of_engine, "attention": of_attention, "lookup": of_lookup}[case["kind"]](case)
    cases.save(result, rows, {"model": case["model"]})


if __name__ == "__main__":
    main()
