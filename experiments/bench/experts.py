"""Times grouped matrix products and an expert layer: `python experiments/bench/experts.py [--out FOLDER] [--small]`.

Compares each implementation with one dense product (or feed-forward layer) of equal arithmetic, forward and with
gradients, with top-1 and top-2 routing, and with even and skewed groups. A case takes at most about --seconds, plus
compilation; cases that cannot run become rows with the reason. The record is written after every case.

On a CPU, or with --small, the sizes are small and only show that everything runs.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import timing

import memjax
from memjax.models.feed_forward import FeedForward
from memjax.models.moe import MoE
from memjax.ops import dispatch

COLUMNS = ("what", "top k", "groups", "implementation", "ms", "TFLOP/s", "of dense", "note")
EXPERTS = 8


class Bench:
    """Sizes, and the rows measured so far."""

    def __init__(self, *, small: bool, seconds: float, out: pathlib.Path):
        self.tokens, self.dim, self.hidden = (256, 64, 96) if small else (16384, 1024, 2816)
        self.seconds, self.out = seconds, out
        self.implementations = [name for name in dispatch.IMPLEMENTATIONS if not dispatch.why_not(name)]
        self.rows: list[dict[str, Any]] = []
        self.record = timing.environment() | {
            "tokens": self.tokens,
            "dim": self.dim,
            "ffn_dim": self.hidden,
            "experts": EXPERTS,
        }

    def normal(self, seed: int, *shape: int) -> jax.Array:
        """Normal numbers in bfloat16, scaled so that products have about unit variance."""
        scale = shape[-2] ** -0.5 if len(shape) == 3 else 1
        return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(jnp.bfloat16)

    def measure(
        self, case: dict[str, Any], function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], flops: int
    ) -> float | None:
        """Times a case, adds and prints its row, and writes the record; returns None if it cannot run."""
        row: dict[str, Any] = dict(case)
        print(f"... {', '.join(map(str, case.values()))}", flush=True)
        ms = None
        try:
            ms = median_within(jax.jit(function), inputs, self.seconds)
        except Exception as error:  # out of memory, or a kernel that does not compile, is a result
            row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            row |= {"ms": ms, "TFLOP/s": flops / ms / 1e9}
            dense = [other["ms"] for other in self.rows if is_dense_of(other, case) and "ms" in other]
            if dense:
                row["of dense"] = dense[0] / ms
        self.rows.append(row)
        print(timing.table([row], COLUMNS).splitlines()[-1], flush=True)
        timing.write_record(self.out, self.record | {"rows": self.rows})
        return ms


def is_dense_of(row: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether a row is the dense counterpart of a case."""
    return row["implementation"] == "dense" and all(row[name] == case[name] for name in ("what", "top k"))


def median_within(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], seconds: float) -> float:
    """The median time of a call in milliseconds, over as many calls as fit into `seconds`, at most 150."""
    jax.block_until_ready(function(*inputs[0]))
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs[-1]))
    fitting = int(seconds / max(time.perf_counter() - start, 1e-6))
    calls = min(10, max(1, fitting // 3))
    return timing.median_ms(function, inputs, rounds=min(15, max(1, fitting // calls)), calls=calls)


def group_sizes(load: str, num_rows: int) -> jax.Array:
    """Sizes of even groups, or of skewed ones: each has half of the remaining rows, and the last none."""
    if load == "even":
        return jnp.full((EXPERTS,), num_rows // EXPERTS, jnp.int32)
    sizes = [num_rows >> (number + 1) for number in range(EXPERTS - 1)]
    sizes[0] += num_rows - sum(sizes)
    return jnp.asarray([*sizes, 0], jnp.int32)


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The function's gradients with respect to its first two arguments; the cotangent is its own output."""

    def run(left: jax.Array, right: jax.Array, *rest: jax.Array) -> Any:
        out, pull = jax.vjp(lambda left, right: function(left, right, *rest), left, right)
        return pull(out)

    return run


def products(bench: Bench, top_k: int) -> None:
    """Times one product of all tokens' rows, forward and with both gradients."""
    num_rows = bench.tokens * top_k
    rows = [bench.normal(seed, num_rows, bench.dim) for seed in range(2)]
    matrices = bench.normal(9, EXPERTS, bench.dim, bench.hidden)
    flops = 2 * num_rows * bench.dim * bench.hidden
    for what, times, wrap in (("product", 1, lambda function: function), ("product, gradients", 3, with_gradients)):
        case = {"what": what, "top k": top_k, "groups": "one", "implementation": "dense"}
        dense = lambda rows, matrix: rows @ matrix
        bench.measure(case, wrap(dense), [(row, matrices[0]) for row in rows], times * flops)
        for load in ("even", "skewed"):
            sizes = group_sizes(load, num_rows)
            for name in bench.implementations:
                grouped = lambda rows, matrices, sizes, name=name: memjax.grouped_matmul(
                    rows, matrices, sizes, implementation=name
                )
                inputs = [(row, matrices, sizes) for row in rows]
                bench.measure(case | {"groups": load, "implementation": name}, wrap(grouped), inputs, times * flops)


def layers(bench: Bench, top_k: int) -> None:
    """Times a whole layer, including router and sorting, against a feed-forward layer on top_k times the tokens."""
    flops = 3 * 2 * bench.tokens * top_k * bench.dim * bench.hidden
    kwargs: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}

    def measure(case: dict[str, Any], layer: nnx.Module, tokens: int) -> None:
        graphdef, state = nnx.split(layer)

        def forward(x: jax.Array, state: Any) -> jax.Array:
            out = nnx.merge(graphdef, state)(x)
            return out[0] if isinstance(out, tuple) else out

        inputs = [(bench.normal(seed, 1, tokens, bench.dim), state) for seed in range(2)]
        bench.measure({"what": "layer", **case}, forward, inputs, flops)
        bench.measure({"what": "layer, gradients", **case}, with_gradients(forward), inputs, 3 * flops)

    dense = {"top k": top_k, "groups": "one", "implementation": "dense"}
    measure(dense, FeedForward(bench.dim, bench.hidden, **kwargs), bench.tokens * top_k)
    for name in bench.implementations:
        experts = MoE(bench.dim, bench.hidden, num_experts=EXPERTS, top_k=top_k, implementation=name, **kwargs)
        measure(dense | {"groups": "as routed", "implementation": name}, experts, bench.tokens)


def largest_error(bench: Bench) -> float:
    """Largest error of the default implementation against float64, relative to the largest number."""
    sizes = group_sizes("skewed", 512)
    rows, matrices = bench.normal(1, 512, bench.dim), bench.normal(2, EXPERTS, bench.dim, bench.hidden)
    got = np.asarray(jax.jit(memjax.grouped_matmul)(rows, matrices, sizes), np.float64)
    group = np.repeat(np.arange(EXPERTS), np.asarray(sizes))
    wide = np.asarray(matrices, np.float64)
    expected = np.stack([row @ wide[number] for row, number in zip(np.asarray(rows, np.float64), group, strict=True)])
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--small", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time per case, without compilation")
    arguments = parser.parse_args()
    small = arguments.small or jax.default_backend() == "cpu"
    stem = timing.stem("experts", small=small)
    bench = Bench(small=small, seconds=arguments.seconds, out=arguments.out / f"{stem}.json")
    bench.record["largest error"] = largest_error(bench)
    print(
        f"{bench.record['device']}: largest error {bench.record['largest error']:.1e} of the largest number", flush=True
    )
    print(timing.table([], COLUMNS), flush=True)
    for top_k in (1, 2):
        products(bench, top_k)
        layers(bench, top_k)
    record, sizes = (
        bench.record | {"rows": bench.rows},
        f"{bench.tokens:,} tokens, {EXPERTS} experts of {bench.dim} x {bench.hidden}",
    )
    timing.write_report(arguments.out, stem, record, COLUMNS, title="Experts", note=sizes)


if __name__ == "__main__":
    main()
