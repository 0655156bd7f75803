"""The row update in plain XLA: one sort of the picks, one pass over them in chunks, rows written in place.

After the sort, the picks of a row are adjacent. A chunk sums its picks row by row; if its last row continues in the
next chunk, the partial sum is carried over, so every row is read, updated and written once however often it was picked.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rounding import round_to
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.row_update.segments import MOST_PICKS, sorted_picks

CHUNK_BYTES = 1 << 22
"""Summed gradients per chunk of picks."""


def row_update(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Sequence[RowGradient],
    rule: RowRule,
    step: RowStep,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "n d"], TableState]:
    """The reference's update, touching only the rows that were read; temporaries do not grow with the table.

    At most `chunk_bytes` of summed gradients are held at once.
    """
    num_rows, num_columns = table.shape
    dtype = accumulator(table.dtype)
    rows, tokens, weights = sorted_picks(gradients)
    vectors = jnp.concatenate([gradient.vectors for gradient in gradients])
    columns = step.first_column + jnp.arange(num_columns, dtype=jnp.int32)

    chunk = max(1, min(rows.shape[0], chunk_bytes // (num_columns * dtype.itemsize)))
    # Absent rows, below, are numbered in 32 bits too.
    chunk = max(1, min(chunk, MOST_PICKS - num_rows))
    count = -(-rows.shape[0] // chunk)
    # Rows from num_rows on do not exist: writes to them are dropped. The extra pick closes the last row.
    padding = (0, count * chunk - rows.shape[0] + 1)
    rows = jnp.pad(rows, padding, constant_values=num_rows)
    tokens, weights = jnp.pad(tokens, padding), jnp.pad(weights, padding)
    absent = num_rows + jnp.arange(chunk, dtype=rows.dtype)
    access = {"unique_indices": True, "mode": "drop"}

    def update_chunk(number: Array, carry):
        table, state, partial = carry
        start = number * chunk
        picked = jax.lax.dynamic_slice_in_dim(rows, start, chunk)
        token = jax.lax.dynamic_slice_in_dim(tokens, start, chunk)
        weight = jax.lax.dynamic_slice_in_dim(weights, start, chunk)
        contributions = weight[:, None].astype(dtype) * vectors[token].astype(dtype)

        # Segment s is the s-th distinct row of the chunk.
        segment = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (picked[1:] != picked[:-1]).astype(jnp.int32)]))
        summed = jax.ops.segment_sum(contributions, segment, chunk, indices_are_sorted=True).at[0].add(partial)
        last = segment[-1]
        goes_on = rows[start + chunk] == picked[-1]
        partial = jnp.where(goes_on, summed[last], 0)

        # Unused segments, the unfinished one, and all of them if not ok, get distinct rows out of range.
        target = absent.at[segment].set(picked)
        target = target.at[last].set(jnp.where(goes_on, absent[last], target[last]))
        target = jnp.where(step.ok & (target < num_rows), target, absent)

        old = table.at[target].get(mode="fill", fill_value=0).astype(dtype)
        old_state = {name: array.at[target].get(mode="fill", fill_value=0) for name, array in state.items()}
        new, new_state = rule.apply(old, old_state, summed, step)
        new = round_to(new, table.dtype, rule.stochastic_rounding, step.seed, step.step, target, columns)
        table = table.at[target].set(new, **access)
        state = {name: state[name].at[target].set(new_state[name], **access) for name in state}
        return table, state, partial

    carry = (table, state, vary_like(jnp.zeros(num_columns, dtype), table))
    table, state, _ = jax.lax.fori_loop(0, count, update_chunk, carry)
    return table, state
