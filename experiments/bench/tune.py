"""Finds the best tiles of the Triton kernels on this device: `python experiments/bench/tune.py [--out FOLDER]`.

Times every candidate at the sizes of `ops.py`, and writes the fastest to the operation's `tiles.json`, under the
device's kind.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import memjax
from memjax.io.files import write_atomic
from memjax.ops import tiles
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from ops import IN_TABLE, Bench
from timing import median_ms, median_ms_in_place


def candidates(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def best(operation: str, tried: list[dict[str, int]], measure: Callable[[], float]) -> dict[str, int]:
    """The fastest candidate; prints the time or failure of each."""
    times = []
    for fields in tried:
        with tiles.override(operation, **fields):
            try:
                milliseconds = measure()
            except Exception as error:  # a tile may need too many registers or too much shared memory
                print(f"{operation} {fields}: {type(error).__name__}", flush=True)
                continue
        print(f"{operation} {fields}: {milliseconds:.3f} ms", flush=True)
        times.append((milliseconds, fields))
    return min(times, key=lambda pair: pair[0])[1]


def tune_grouped_matmul(bench: Bench, rounds: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The best tiles for the products of 8 experts with even groups, and for the gradient of their matrices."""
    from memjax.ops.grouped_matmul import triton

    hidden = 11 * bench.dim // 4
    sizes = jnp.full((8,), bench.tokens // 8, jnp.int32)
    rows = [bench.normal(seed, (bench.tokens, bench.dim)) for seed in range(2)]
    matrices, cotangent = bench.normal(2, (8, bench.dim, hidden)), bench.normal(3, (bench.tokens, hidden))
    cases = {
        "grouped_matmul": (triton.grouped_matmul, [(row, matrices, sizes) for row in rows]),
        "grouped_matmul_gradient": (triton.matrices_gradient, [(row, cotangent, sizes) for row in rows]),
    }
    tried = candidates(rows=(64, 128), columns=(128, 256), inner=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
    found = {}
    for operation, (function, inputs) in cases.items():
        # A new function for each candidate, since a traced one keeps its tiles.
        run = lambda function=function, inputs=inputs: median_ms(jax.jit(functools.partial(function)), inputs, **rounds)
        found[operation] = best(operation, tried, run)
    return found


def write(file: pathlib.Path, name: str, fields: dict[str, int]) -> None:
    """Stores the fields of a tile under this device's kind."""
    kind, known = jax.devices()[0].device_kind, json.loads(file.read_text()) if file.exists() else {}
    known.setdefault(kind, {})[name] = fields
    write_atomic(file, json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="folder of <operation>/tiles.json; default: memjax.ops")
    arguments = parser.parse_args()
    bench = Bench(small=jax.default_backend() == "cpu")
    rounds: dict[str, Any] = {"rounds": 7, "calls": 5}
    slots = bench.num_keys**2
    table = bench.table(slots, bench.dim)
    picks = bench.picks_of("uniform", slots)
    found = {}

    bags = [(table, index, bench.weights(0)) for index in picks]
    run = lambda: median_ms(
        jax.jit(functools.partial(memjax.embedding_bag, mode=IN_TABLE, implementation="triton")), bags, **rounds
    )
    found["embedding_bag"] = best(
        "embedding_bag", candidates(rows=(8, 16, 32), columns=(256, 512), num_warps=(1, 2)), run
    )
    dots = [(table, index, bench.normal(0, (bench.tokens, bench.dim))) for index in picks]
    run = lambda: median_ms(
        jax.jit(functools.partial(memjax.embedding_dot, mode=IN_TABLE, implementation="triton")), dots, **rounds
    )
    found["embedding_dot"] = best(
        "embedding_dot", candidates(rows=(8, 16, 32), columns=(256, 512), num_warps=(1, 2)), run
    )

    from memjax.ops.product_key_search.triton_select import select

    for operation, num in (("select", bench.num_keys), ("select_long", 4 * bench.num_keys)):
        rows = (bench.heads, 2, bench.tokens, num)
        scores = [(bench.normal(seed, rows, jnp.float32),) for seed in range(2)]
        run = lambda scores=scores: median_ms(jax.jit(functools.partial(select, top_k=bench.top_k)), scores, **rounds)
        found[operation] = best(operation, candidates(rows=(64, 128, 256), columns=(4,), num_warps=(1,)), run)
        del scores

    rule = RowRule(state_columns=min(256, bench.dim))
    gradients = [(RowGradient(index, bench.weights(0), bench.normal(0, (bench.tokens, bench.dim))),) for index in picks]

    def run_update() -> float:
        update = jax.jit(
            lambda state, gradient: memjax.row_update(
                state[0], state[1], [gradient], rule, row_step(1e-3, 0), implementation="triton"
            ),
            donate_argnums=0,
        )
        state = (jnp.copy(table), rule.init(slots, bench.dim, table.dtype))
        return median_ms_in_place(update, state, gradients, **rounds)[0]

    found["row_update"] = best("row_update", candidates(rows=(2, 4, 8)), run_update)
    found |= tune_grouped_matmul(bench, rounds)
    for name, fields in found.items():
        operation = "product_key_search" if name.startswith("select") else name.removesuffix("_gradient")
        write(tiles.file_of(operation, arguments.out), name, fields)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
