"""Times the memory operations and one memory layer: `python experiments/bench/ops.py [--out FOLDER] [--small]`.

The unit F is the bag's bytes (tokens x picks x value_dim x itemsize) over the copy bandwidth measured in the same run.
On a CPU, or with --small, the sizes are small and only show that everything runs.
"""

import argparse
import functools
import importlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import memjax
from memjax.ops import dispatch
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import timing
from layer_step import layer_step
from timing import DISTRIBUTIONS, draw_indices, median_ms, median_ms_in_place

COLUMNS = ("operation", "shape", "indices", "implementation", "ms", "F", "GB/s", "of copy")
IN_TABLE = "promise_in_bounds"
"""Index mode that the layers use: without bounds checks."""


class Bench:
    """Sizes, the copy bandwidth, and the rows measured so far."""

    def __init__(self, small: bool):
        self.tokens, self.heads, self.top_k = (256, 2, 8) if small else (16384, 4, 32)
        self.dim, self.num_keys, self.key_dim = (128, 64, 32) if small else (1024, 1024, 512)
        self.small, self.picks = small, self.heads * self.top_k
        self.rounds = {"rounds": 3, "calls": 2} if small else {"rounds": 15, "calls": 10}
        self.copies = timing.copy_bandwidth(1 << 24 if small else 1 << 31)
        self.bandwidth = max(self.copies.values())
        self.unit_ms = self.tokens * self.picks * self.dim * 2 / self.bandwidth * 1e3
        self.implementations = [dispatch.choose("embedding_bag", None)]
        self.implementations += ["xla"] if "xla" not in self.implementations else []
        self.rows: list[dict[str, Any]] = []

    def record(
        self, operation: str, shape: str, indices: str, implementation: str, ms: float, num_bytes: int | None = None
    ):
        """Adds a row and prints it."""
        speed = num_bytes / ms / 1e6 if num_bytes else None
        row = {
            "operation": operation,
            "shape": shape,
            "indices": indices,
            "implementation": implementation,
            "ms": ms,
            "F": ms / self.unit_ms,
            "GB/s": round(speed) if speed else None,
            "of copy": speed * 1e9 / self.bandwidth if speed else None,
        }
        self.rows.append(row)
        print(timing.table([row], COLUMNS).splitlines()[-1], flush=True)

    def table(self, num_rows: int, dim: int) -> jax.Array:
        """A bfloat16 table of normal numbers, drawn in place."""
        from memjax.memory.table import draw_rows

        return jax.jit(
            functools.partial(draw_rows, num_slots=num_rows, value_dim=dim, std=dim**-0.5, dtype=jnp.bfloat16)
        )(jax.random.key(0))

    def picks_of(self, distribution: str, num_rows: int, count: int = 3) -> list[jax.Array]:
        """Several draws of row indices, [tokens, picks]."""
        return [draw_indices(distribution, num_rows, (self.tokens, self.picks), seed) for seed in range(count)]

    def normal(self, seed: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)

    def weights(self, seed: int) -> jax.Array:
        return jax.nn.softmax(self.normal(seed, (self.tokens, self.picks), jnp.float32), axis=-1)


def bag_and_dot(bench: Bench) -> None:
    """Times both gathers over value_dims and index distributions."""
    slots = bench.num_keys**2
    dims = [bench.dim] if bench.small else [bench.dim, 1536, 256, 768, 48]
    for dim in dims:
        table = bench.table(slots, dim)
        num_bytes = bench.tokens * bench.picks * dim * 2
        for distribution in DISTRIBUTIONS if dim == bench.dim else ("uniform",):
            picks = bench.picks_of(distribution, slots)
            bags = [(table, index, bench.weights(seed)) for seed, index in enumerate(picks)]
            dots = [(table, index, bench.normal(seed, (bench.tokens, dim))) for seed, index in enumerate(picks)]
            for name in bench.implementations if dim == bench.dim else bench.implementations[:1]:
                for operation, function, inputs in (
                    ("embedding_bag", functools.partial(memjax.embedding_bag, mode=IN_TABLE), bags),
                    ("embedding_dot", functools.partial(memjax.embedding_dot, mode=IN_TABLE), dots),
                ):
                    run = jax.jit(functools.partial(function, implementation=name))
                    ms = median_ms(run, inputs, **bench.rounds)
                    bench.record(operation, f"{slots:,} x {dim}", distribution, name, ms, num_bytes)


def search(bench: Bench) -> None:
    """Times the whole search, forward and backward."""
    for num_keys in [bench.num_keys] if bench.small else [bench.num_keys, 4096, 8192]:
        queries = [bench.normal(seed, (bench.tokens, bench.heads, bench.key_dim)) for seed in range(3)]
        keys = bench.normal(9, (bench.heads, 2, num_keys, bench.key_dim // 2))
        cotangent = bench.normal(10, (bench.tokens, bench.heads, bench.top_k), jnp.float32)
        for name in bench.implementations if num_keys == bench.num_keys else bench.implementations[:1]:
            forward = jax.jit(functools.partial(memjax.product_key_search, top_k=bench.top_k, implementation=name))
            module = importlib.import_module(f"memjax.ops.product_key_search.{name}")
            backward = jax.jit(module.search_gradient)
            slots = [forward(query, keys)[1] for query in queries]
            shape = f"n = {num_keys}, top {bench.top_k}"
            ms = median_ms(forward, [(query, keys) for query in queries], **bench.rounds)
            bench.record("product_key_search", shape, "", name, ms)
            ms = median_ms(
                backward, [(q, keys, s, cotangent) for q, s in zip(queries, slots, strict=True)], **bench.rounds
            )
            bench.record("product_key_search backward", shape, "", name, ms)


def row_update(bench: Bench) -> None:
    """Times the update over table sizes, distributions, optimizers and layers."""
    slots = bench.num_keys**2
    sizes = [slots] if bench.small else [slots, 65_536, 16_777_216]
    # The same rows in every table: only the size of the table changes, not what is read and written.
    small_picks = bench.picks_of("uniform", min(sizes))

    def measure(label: str, num_rows: int, picks: list[jax.Array], rule: RowRule, layers: int, indices: str, name: str):
        table = bench.table(num_rows, bench.dim)
        state = (table, rule.init(num_rows, bench.dim, table.dtype))
        del table

        @functools.partial(jax.jit, donate_argnums=0)
        def update(state, step, *gradients):
            table, moments = state
            return memjax.row_update(table, moments, list(gradients), rule, row_step(1e-3, step), implementation=name)

        # Created anew for every case, as each table may fill the device.
        inputs = []
        for step, index in enumerate(picks):
            gradients = [
                RowGradient(
                    jnp.roll(index, layer, 0),
                    bench.weights(layer),
                    bench.normal(layer + step, (bench.tokens, bench.dim)),
                )
                for layer in range(layers)
            ]
            inputs.append((step, *gradients))
        compiled = update.lower(state, *inputs[0]).compile().memory_analysis()
        assert compiled is not None
        ms, state = median_ms_in_place(update, state, inputs, **bench.rounds)
        temporary = f", {compiled.temp_size_in_bytes / 2**20:.0f} MiB temporary"
        bench.record(f"row_update {label}", f"{num_rows:,} x {bench.dim}{temporary}", indices, name, ms)

    columns = min(256, bench.dim)
    rowwise = RowRule(kind="rowwise_adam", state_columns=columns)
    main = bench.implementations[0]
    for distribution in DISTRIBUTIONS:
        for name in bench.implementations if distribution == "uniform" else [main]:
            measure("rowwise_adam", slots, bench.picks_of(distribution, slots), rowwise, 1, distribution, name)
    for num_rows in sizes:
        measure("rowwise_adam", num_rows, small_picks, rowwise, 1, f"same {min(sizes):,} rows", main)
    if not bench.small:
        for num_rows in sizes[1:]:
            measure("rowwise_adam", num_rows, bench.picks_of("uniform", num_rows), rowwise, 1, "uniform", main)
    measure("rowwise_adam, 3 layers", slots, bench.picks_of("uniform", slots), rowwise, 3, "uniform", main)
    for kind in ("sgd", "adam"):
        measure(kind, slots, bench.picks_of("uniform", slots, 2), RowRule(kind=kind), 1, "uniform", main)


def layer(bench: Bench) -> None:
    """Times one Memory+ layer: forward, backward and the update of its table."""
    for num_keys in [bench.num_keys] if bench.small else [bench.num_keys, 4096]:
        for name in bench.implementations if num_keys == bench.num_keys else bench.implementations[:1]:
            ms = layer_ms(bench, num_keys, name)
            shape = f"{num_keys**2:,} x {bench.dim}"
            bench.record("memory layer, forward + backward + update", shape, "", name, ms)


def layer_ms(bench: Bench, num_keys: int, name: str) -> float:
    """Milliseconds of a layer with one implementation; its table is freed afterwards."""
    slots, rule = num_keys**2, RowRule(kind="rowwise_adam", state_columns=min(256, bench.dim))
    model = memjax.MemoryLayer(
        bench.dim,
        num_keys=num_keys,
        num_heads=bench.heads,
        top_k=bench.top_k,
        key_dim=bench.key_dim,
        qk_norm=False,
        score_scale=1.0,
        dtype=jnp.bfloat16,
        implementation=name,
        rngs=nnx.Rngs(0),
    )
    table = bench.table(slots, bench.dim)
    state = (table, rule.init(slots, bench.dim, table.dtype))
    del table
    params, step = layer_step(
        model,
        zeros=lambda _: jnp.zeros((bench.tokens, bench.dim), jnp.bfloat16),
        bag=lambda rows, indices, weights, zeros: (
            memjax.embedding_bag(rows, indices, weights, implementation=name) + zeros
        ),
        update=lambda table, moments, rows: memjax.row_update(
            table, moments, rows, rule, row_step(1e-3, 0), implementation=name
        ),
    )
    step = jax.jit(step, donate_argnums=0)
    normal = lambda seed: bench.normal(seed, (bench.tokens, bench.dim))
    inputs = [(params, normal(seed), normal(seed + 5)) for seed in range(3)]
    ms, _ = median_ms_in_place(lambda state, *rest: step(state, *rest)[0], state, inputs, **bench.rounds)
    return ms


def checks(bench: Bench) -> dict[str, Any]:
    """Checks the timed implementation: exact scores, and equal bits in two runs."""
    name, found = bench.implementations[0], {}
    for num_keys in (bench.num_keys, 4 * bench.num_keys):
        queries = bench.normal(1, (64, bench.heads, bench.key_dim))
        keys = bench.normal(2, (bench.heads, 2, num_keys, bench.key_dim // 2))
        search = jax.jit(functools.partial(memjax.product_key_search, top_k=bench.top_k, implementation=name))
        scores, slots = jax.device_get(search(queries, keys))
        halves = np.asarray(queries, np.float64).reshape(64, bench.heads, 2, -1)
        half = np.einsum("thcd,hcnd->thcn", halves, np.asarray(keys, np.float64))
        best = np.sort(half, axis=-1)[..., -bench.top_k :]
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).reshape(64, bench.heads, -1)
        oracle = np.sort(sums, axis=-1)[..., : -bench.top_k - 1 : -1]
        found[f"search n={num_keys}: largest relative error of sorted scores"] = float(
            np.max(np.abs(scores - oracle) / np.abs(oracle))
        )
        found[f"search n={num_keys}: slots are distinct"] = bool(
            all(len(set(row)) == bench.top_k for row in slots.reshape(-1, bench.top_k))
        )
    slots = bench.num_keys**2
    table = bench.table(slots, bench.dim)
    index, rule = bench.picks_of("zipf", slots, 1)[0], RowRule(state_columns=min(256, bench.dim))
    gradient = RowGradient(index, bench.weights(0), bench.normal(3, (bench.tokens, bench.dim)))
    state = rule.init(slots, bench.dim, table.dtype)
    update = jax.jit(
        lambda t, s, g, i: memjax.row_update(t, s, [g], rule, row_step(1e-2, 3, seed=7), implementation=i),
        static_argnums=3,
    )
    runs = [update(table, state, gradient, name) for _ in range(2)]
    same = lambda a, b: bool(jnp.array_equal(a.view(jnp.uint16), b.view(jnp.uint16)))
    found["row_update: two runs give the same bits"] = same(runs[0][0], runs[1][0])
    bags = [
        jax.jit(functools.partial(memjax.embedding_bag, implementation=name))(table, index, bench.weights(0))
        for _ in range(2)
    ]
    found["embedding_bag: two runs give the same bits"] = same(*bags)
    other = update(table, state, gradient, "xla")
    change, difference = (other[0] - table).astype(jnp.float32), (other[0] - runs[0][0]).astype(jnp.float32)
    found["row_update: norm of the difference from xla over norm of the change"] = float(
        jnp.linalg.norm(difference) / jnp.linalg.norm(change)
    )
    return found


def peers(bench: Bench) -> None:
    """Times PyTorch's equivalents for information, if it can be imported."""
    try:
        import torch
    except ImportError as error:
        print(f"PyTorch cannot be imported ({error}): no peers")
        return
    if not torch.cuda.is_available() or bench.small:
        print("PyTorch has no GPU here: no peers")
        return
    import torch.nn.functional as F

    measure = timing.median_cuda_ms
    slots = bench.num_keys**2
    table = torch.randn(slots, bench.dim, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, slots, (bench.tokens, bench.picks), device="cuda")
    weight = torch.rand(bench.tokens, bench.picks, device="cuda", dtype=torch.bfloat16)
    num_bytes = bench.tokens * bench.picks * bench.dim * 2
    bag = lambda: F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    bench.record("embedding_bag", f"{slots:,} x {bench.dim}", "uniform", "torch", measure(bag), num_bytes)
    scores = torch.randn(bench.tokens * bench.heads * 2, bench.num_keys, device="cuda")
    topk = lambda scores: torch.topk(scores, bench.top_k)
    rows = f"{scores.shape[0]:,} rows of {bench.num_keys}"
    bench.record("top-k alone", rows, "", "torch", measure(lambda: topk(scores)))
    compiled = torch.compile(topk)
    bench.record("top-k alone", rows, "", "torch.compile", measure(lambda: compiled(scores)))
    parameter = torch.nn.Parameter(table)
    parameter.grad = torch.randn_like(table)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    bench.record("AdamW on the whole table", f"{slots:,} x {bench.dim}", "", "torch fused", measure(optimizer.step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--small", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument("--only", nargs="*", help="parts to run: bag_and_dot search row_update layer peers")
    arguments = parser.parse_args()
    bench = Bench(arguments.small or jax.default_backend() == "cpu")
    environment = timing.environment()
    print(f"{environment['device']}: copy {bench.bandwidth / 1e12:.2f} TB/s, F = {bench.unit_ms:.3f} ms", flush=True)
    print(timing.table([], COLUMNS))
    parts = {part.__name__: part for part in (bag_and_dot, search, row_update, layer, peers)}
    for name in arguments.only or parts:
        parts[name](bench)
    found = checks(bench)
    for claim, value in found.items():
        print(f"{claim}: {value}")
    record = {
        **environment,
        "copy_bytes_per_second": bench.bandwidth,
        "copies": bench.copies,
        "F_ms": bench.unit_ms,
        "tokens": bench.tokens,
        "picks": bench.picks,
        "checks": found,
        "rows": bench.rows,
    }
    ceiling = f"copy {bench.bandwidth / 1e12:.2f} TB/s; F = {bench.unit_ms:.3f} ms"
    stem = timing.stem("ops", small=bench.small)
    timing.write_report(arguments.out, stem, record, COLUMNS, title="Operations", note=ceiling)


if __name__ == "__main__":
    main()
