"""How row gradients cross the `data` axis of a mesh: an all-gather of their factors, or an all-reduce of dense sums."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp

from memjax.config import checks
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.dense import BLOCK_BYTES, BLOCK_COPIES, piece_tokens
from memjax.ops.row_update.segments import MOST_PICKS

Collective = Literal["all_gather", "all_reduce"]
CollectiveOption = Literal["auto", "all_gather", "all_reduce"]

PICK_BYTES = 40
"""Bytes per pick while rows are updated: row, token and weight, sorted and unsorted, and the segments' starts."""


class ReduceBytes(NamedTuple):
    """Bytes per device for one update of a table."""

    received: int
    """Received from other replicas, over `data`."""
    gradient: int
    """Held for the dense gradient."""
    picks: int
    """Held for picks and vectors while they are sorted and summed."""

    @property
    def total(self) -> int:
        """Bytes received and held."""
        return sum(self)


def reduce_bytes(
    table: Any, gradients: Sequence[RowGradient], *, data_axis: int, memory_axis: int
) -> dict[Collective, ReduceBytes]:
    """The bytes that each collective takes for row gradients of all tokens of the mesh. Only shapes are used."""
    num_rows, columns = table.shape[0], table.shape[1] // memory_axis
    picks = sum(gradient.indices.size for gradient in gradients)
    vectors = sum(gradient.indices.shape[0] * columns * gradient.vectors.dtype.itemsize for gradient in gradients)
    of_picks = sum(
        gradient.indices.size * (gradient.indices.dtype.itemsize + gradient.weights.dtype.itemsize)
        for gradient in gradients
    )
    row = columns * accumulator(table.dtype).itemsize
    # An all-reduce sends everything twice, before and after the summation. Counts of picks go with the rows.
    reduced = 2 * num_rows * (row + jnp.dtype(jnp.int32).itemsize)
    from_others = lambda count: count * (data_axis - 1) // data_axis
    return {
        "all_gather": ReduceBytes(from_others(of_picks + vectors), 0, picks * PICK_BYTES + vectors),
        "all_reduce": ReduceBytes(
            from_others(reduced),
            num_rows * row + BLOCK_COPIES * min(num_rows * row, BLOCK_BYTES),
            max(_of_one(gradient, gradient.indices.shape[0] // data_axis, columns) for gradient in gradients),
        ),
    }


def sums_micro_batches(
    wanted: CollectiveOption,
    table: Any,
    gradients: Sequence[RowGradient],
    count: int,
    *,
    data_axis: int,
    memory_axis: int,
) -> bool:
    """Whether to sum row gradients densely after each micro-batch of a step, instead of keeping them until the update.

    auto chooses what holds fewer bytes; all_gather always keeps them. The row gradients are those of one of the step's
    `count` micro-batches; only their shapes are used.
    """
    if count == 1 or wanted == "all_gather":
        return False
    axes = {"data_axis": data_axis, "memory_axis": memory_axis}
    sizes = [factor.size * factor.dtype.itemsize for gradient in gradients for factor in gradient]
    factors = sum(sizes) // (data_axis * memory_axis)
    every = [*gradients] * count
    kept = reduce_bytes(table, every, **axes)[choose(wanted, table, every, **axes)]
    summed = reduce_bytes(table, gradients, **axes)["all_reduce"]
    return factors + summed.gradient + summed.picks < count * factors + kept.gradient + kept.picks


def _of_one(gradient: RowGradient, num_tokens: int, columns: int) -> int:
    """Bytes held while one gradient is summed: its gathered picks, and a sorted piece of them with its vectors."""
    k, width = gradient.indices.shape[1], gradient.vectors.dtype.itemsize
    gathered = num_tokens * k * (gradient.indices.dtype.itemsize + gradient.weights.dtype.itemsize)
    return gathered + piece_tokens(num_tokens, k) * (k * PICK_BYTES + columns * width)


def choose(
    wanted: CollectiveOption,
    table: Any,
    gradients: Sequence[RowGradient],
    *,
    data_axis: int,
    memory_axis: int,
) -> Collective:
    """The collective that runs; arguments as for `reduce_bytes`.

    auto chooses the one that receives and holds fewer bytes in total. On one replica, where nothing crosses `data`, it
    chooses all_reduce only if there are too many picks to sort at once.

    Raises:
        ValueError: `wanted` is unknown.
    """
    checks.refuse(checks.one_of(get_args(CollectiveOption), collective=wanted))
    if wanted != "auto":
        return wanted
    if sum(gradient.indices.size for gradient in gradients) > MOST_PICKS:
        return "all_reduce"
    if data_axis == 1:
        return "all_gather"
    found = reduce_bytes(table, gradients, data_axis=data_axis, memory_axis=memory_axis)
    return min(found, key=lambda name: found[name].total)
