"""Predicts from the config how row gradients cross the `data` axis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.config.run import RunConfig
from memjax.memory import row_grad_reduce
from memjax.memory.row_grad_reduce import Collective, ReduceBytes
from memjax.monitoring.units import aligned, gigabytes
from memjax.ops.precision import accumulator, resolve_dtype
from memjax.ops.row_gradient import RowGradient


class PlannedReduce(NamedTuple):
    """The collective of the table that is read most, and the bytes per device of either collective."""

    chosen: Collective
    bytes: dict[Collective, ReduceBytes]
    sums: bool
    """Whether row gradients are summed densely after each micro-batch."""


def plan_reduce(config: RunConfig, *, data_axis: int) -> PlannedReduce | None:
    """The collective of a run over data_axis x mesh.memory devices; None if no rows are updated."""
    data, accumulate, tables = config.data, config.train.grad_accum_steps, config.model.tables
    if not tables or config.optim.table.is_dense:
        return None
    busiest = max(tables.values(), key=lambda table: len(table.readers) * table.picks)
    tokens, dtype = data.batch_size // accumulate * data.sequence_length, resolve_dtype(busiest.dtype)
    picks, weight = (tokens, busiest.picks), accumulator(resolve_dtype(config.model.dtype))
    factors = ((picks, jnp.int32), (picks, weight), ((tokens, busiest.width), dtype))
    gradient = RowGradient._make(jax.ShapeDtypeStruct(*factor) for factor in factors)
    of_one, wanted = [gradient] * len(busiest.readers), config.mesh.row_grad_reduce
    table = jax.ShapeDtypeStruct((busiest.num_slots, busiest.width), dtype)
    axes = {"data_axis": data_axis, "memory_axis": config.mesh.memory}
    sums = row_grad_reduce.sums_micro_batches(wanted, table, of_one, accumulate, **axes)
    gradients = of_one if sums else of_one * accumulate
    chosen = "all_reduce" if sums else row_grad_reduce.choose(wanted, table, gradients, **axes)
    return PlannedReduce(chosen, row_grad_reduce.reduce_bytes(table, gradients, **axes), sums)


def describe(config: RunConfig, *, data_axis: int) -> str:
    """The bytes of both collectives, and which one runs; empty if no rows are updated."""
    planned = plan_reduce(config, data_axis=data_axis)
    if planned is None:
        return ""
    how = f"{planned.chosen} (mesh.row_grad_reduce: {config.mesh.row_grad_reduce})"
    how += ", summed over micro-batches" if planned.sums else ""
    rows = [("row gradients over data", how)]
    for name, count in planned.bytes.items():
        held = gigabytes(count.gradient + count.picks)
        rows.append((f"  {name}", f"{gigabytes(count.received)} received by each device, {held} held"))
    return aligned(rows)
