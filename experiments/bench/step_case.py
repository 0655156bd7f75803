"""Measures one case of the training step benchmark in its own process: `step_case.py CASE RESULT`.

With one process per case, leftovers in device memory or an out-of-memory error do not affect the next case, and the
allocator's peak is that of the case. Started by train_step.py.
"""

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import memjax
from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.memory import sharded
from memjax.memory.read import zero_perturbation
from memjax.memory.table import draw_rows
from memjax.models import dot_product
from memjax.models.counts import count_parameters, training_flops
from memjax.monitoring.metrics import peak_flops
from memjax.monitoring.profile import describe_overlap, is_collective, newest_trace, operations, overlaps, table
from memjax.ops.precision import resolve_dtype
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.sharding.mesh import make_mesh, put_batch
from memjax.sharding.rules import COLUMNS, MICRO_BATCHES, TOKENS
from memjax.training.plan import memory as memory_plan
from memjax.training.program import TrainProgram
from memjax.training.step import make_train_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import timing
from layer_step import layer_step

Row = dict[str, Any]


BEGUN = time.perf_counter()


def say(what: str) -> None:
    """Prints a progress line: most of a case's time is not spent in its steps."""
    print(f"  {time.perf_counter() - BEGUN:6.1f} s: {what}", file=sys.stderr, flush=True)


def seconds_of(step: Callable[[Any], Any], state: Any, case: Row) -> tuple[float, Any]:
    """Seconds of a step that donates its state: the median over windows of chained steps, each with one wait."""
    for _ in range(2):
        state = jax.block_until_ready(step(state))
    times = []
    for _ in range(case["windows"]):
        started = time.perf_counter()
        for _ in range(case["steps"]):
            state = step(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - started) / case["steps"])
    return statistics.median(times), state


def random_batch(config: RunConfig, documents: bool) -> dict[str, np.ndarray]:
    """Uniformly random tokens; each row is one text, or holds documents of 512 tokens on average."""
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.sequence_length)
    starts = np.zeros(shape, bool)
    if documents:
        starts = rng.random(shape) < 1 / 512
    starts[:, 0] = True
    place = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {
        "tokens": rng.integers(config.model.vocab_size, size=shape, dtype=np.int32),
        "targets": rng.integers(config.model.vocab_size, size=shape, dtype=np.int32),
        "segments": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=1),
        "loss_mask": np.ones(shape, np.float32),
    }
    return {name: rows.reshape(config.train.grad_accum_steps, -1, shape[1]) for name, rows in batch.items()}


def distinct_rows(program: TrainProgram, state: Any, batch: dict[str, jax.Array]) -> Row:
    """Number of picks of a batch, and of distinct table rows among them."""
    memory = program.config.model.memory
    if memory is None:
        return {}

    @jax.jit
    def picks(params: Any, tables: Any, tokens: jax.Array, positions: jax.Array) -> list[jax.Array]:
        reads = program.parts.merge(params, tables).hidden(tokens, positions).reads
        return [of_layer[0].indices for of_layer in reads.values()]

    found = jax.device_get(picks(state.params, state.tables, batch["tokens"][0], batch["positions"][0]))
    return {
        "picks": sum(indices.size for indices in found),
        "distinct rows": int(np.unique(np.concatenate([indices.ravel() for indices in found])).size),
        "table slots": memory.num_slots,
    }


def allocator_peak(device: Any) -> float | None:
    """Peak gigabytes in use on a device over the life of this process; None if the device does not report it."""
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats else None


def whole_step(config: RunConfig, devices: list[Any], case: Row) -> Row:
    """Measures a training step as in a run."""
    say("imported")
    program, mesh = TrainProgram.of(config), make_mesh(config, devices)
    say("model's shapes known")
    tokens = config.data.batch_size * config.data.sequence_length
    predicted = memory_plan.plan(config, data_axis=mesh.shape["data"], program=program)
    row: Row = {"tokens": tokens, "attention": attention_of(config), "predicted GB": predicted.total / 1e9}
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit and predicted.total > 1.1 * limit:
        return row | {"note": f"does not fit: a device has {limit / 1e9:.1f} GB"}
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0), mesh)
        batch = put_batch(mesh, random_batch(config, case["documents"]), MICRO_BATCHES)
        jax.block_until_ready(state)
        say("state drawn")
        if case["count_rows"]:
            row |= distinct_rows(program, state, batch)
        started = time.perf_counter()
        compiled = make_train_step(program, mesh).lower(state, batch).compile()
        row["compile s"] = time.perf_counter() - started
        say("compiled")
        row["compiled GB"] = memory_plan.compiled_bytes(compiled) / 1e9
        row["prediction"] = {name: count / 1e9 for name, count in (predicted.state | predicted.temporary).items()}
        analysis = compiled.memory_analysis()
        assert analysis is not None
        row["temporary GB"] = analysis.temp_size_in_bytes / 1e9
        state, first = compiled(state, batch)
        jax.block_until_ready(state)
        say("first step done")
        seconds, state = seconds_of(lambda state: compiled(state, batch)[0], state, case)
        state, last = compiled(state, batch)
        row |= {"first loss": float(first["train/loss"]), "last loss": float(last["train/loss"])}
        row["peak GB"] = allocator_peak(devices[0])
        if row["peak GB"]:
            row["predicted / peak"] = row["predicted GB"] / row["peak GB"]
        row |= traced(lambda state: compiled(state, batch)[0], state, case)
    speed, counts = tokens / seconds, count_parameters(program.parts)
    row |= {
        "ms": seconds * 1e3,
        "tokens/s": round(speed),
        "dense parameters": counts.dense,
        "table parameters": counts.table,
    }
    if peak := peak_flops(devices[0]):
        freeze_dense = config.optim.freeze_dense
        flops = training_flops(program.parts, config.data.sequence_length, freeze_dense=freeze_dense).total
        row["MFU"] = speed * flops / (peak * len(devices))
    return row


def attention_of(config: RunConfig) -> str:
    """The attention implementation that runs."""
    wanted = None if config.train.attention == "auto" else config.train.attention
    dtype, length = resolve_dtype(config.model.dtype), config.data.sequence_length
    return dot_product.choose(wanted, dtype, config.model.head_width, length)


def traced(step: Callable[[Any], Any], state: Any, case: Row) -> Row:
    """Traces three steps: the slowest operations, or the collectives, and how much of them each GPU hid.

    The trace is kept if the case has a folder for it.
    """
    if not case.get("traces"):
        return {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(case["profile"] or temporary)
        with jax.profiler.trace(str(folder)):
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
        trace = jax.profiler.ProfileData.from_file(str(newest_trace(folder)))
    found, by_device = operations(trace), overlaps(trace)
    mean = lambda name: statistics.mean(getattr(overlap, name) for overlap in by_device.values()) / 3 * 1e3
    row: Row = {f"{name} ms": mean(name) for name in ("collectives", "exposed") if by_device}
    if case["traces"] == "collectives":
        found = [operation for operation in found if is_collective(operation.name)]
    print(table(found, 30), *(describe_overlap(*pair) for pair in by_device.items()), sep="\n", flush=True)
    total = sum(operation.seconds for operation in found)
    slowest = [
        {"operation": name, "ms a step": seconds / 3 * 1e3, "share": seconds / total, "uses": uses / 3}
        for name, seconds, uses in found[:30]
    ]
    times = {
        device: {f"{name} ms a step": seconds / 3 * 1e3 for name, seconds in overlap._asdict().items()}
        for device, overlap in by_device.items()
    }
    return row | {"profile": slowest, "overlap": times}


def memory_layer(config: RunConfig, devices: list[Any], case: Row) -> Row:
    """Measures one memory layer, forward and backward with the update of its table, split over all devices."""
    memory, dim, mesh = config.model.memory, config.model.dim, make_mesh(config, devices)
    assert memory is not None
    dtype, tokens = resolve_dtype(config.model.dtype), config.data.batch_size * config.data.sequence_length
    rule = RowRule(state_columns=config.optim.table.columns_per_state(dim))
    split = lambda spec: jax.sharding.NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        papers = {"qk_norm": False, "score_scale": 1.0, "value_dim": None, "gate": "silu", "output_gate": False}
        layer = memjax.MemoryLayer(dim, memory, **papers, placement="replace", dtype=dtype, rngs=nnx.Rngs(0))
        params, step = layer_step(
            layer,
            zeros=lambda table: zero_perturbation("bag", tokens, memory.picks, table),
            bag=sharded.bag,
            update=lambda table, moments, rows: sharded.update_rows(table, moments, rows, rule, row_step(1e-3, 0)),
        )

        def start(key: jax.Array):
            table = draw_rows(key, memory.num_slots, dim, std=dim**-0.5, dtype=dtype)
            return table, rule.init(memory.num_slots, dim, dtype)

        table_state = jax.jit(start, out_shardings=split(COLUMNS))(jax.random.key(0))
        draw = jax.jit(lambda key: jax.random.normal(key, (tokens, dim)).astype(dtype), out_shardings=split(TOKENS))
        x, target = draw(jax.random.key(1)), draw(jax.random.key(2))

        compiled = jax.jit(step, donate_argnums=0).lower(table_state, params, x, target).compile()
        run = lambda state: compiled(state, params, x, target)[0]
        seconds, table_state = seconds_of(run, table_state, case)
        row: Row = {"tokens": tokens, "ms": seconds * 1e3, "tokens/s": round(tokens / seconds)}
        return row | {"peak GB": allocator_peak(devices[0])} | traced(run, table_state, case)


def config_of(case: Row, more: list[str] | None = None) -> RunConfig:
    """The config of a case: its preset with its settings."""
    return load(RunConfig, pathlib.Path(case["preset"]), [*case["settings"], *(more or [])])


def main() -> None:
    """Writes the case's rows as JSON."""
    case, result = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    measure = memory_layer if case["kind"] == "layer" else whole_step
    row = timing.attempt(lambda: measure(config_of(case), jax.devices()[: case["devices"]], case))
    result.write_text(json.dumps({"rows": [row], "environment": timing.environment()}))


if __name__ == "__main__":
    main()
