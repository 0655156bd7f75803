"""The row update by way of a dense gradient: first all picks are summed, then the rows that were read are updated.

It takes as much memory as the table, but picks can come in pieces, and the dense gradients of replicas can be summed.
With many picks on many devices, that is less than all of their picks on every device.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memjax.ops.manual_axes import vary_like, vary_together
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rounding import round_to
from memjax.ops.row_update.rules import RowRule, RowStep, TableState, row_step

PIECE_PICKS = 1 << 26
"""Maximum number of picks that are sorted at once."""

BLOCK_BYTES = 1 << 26
"""Dense gradient of the rows that are updated together."""

BLOCK_COPIES = 5
"""Arrays of a block's size while it is updated: its gradient, the sum of replicas, rows and state before and after."""


def summed(
    gradients: Sequence[RowGradient],
    start: tuple[Float[Array, "n d"], Bool[Array, " n"]],
    *,
    gather: Callable[[RowGradient], RowGradient] = lambda gradient: gradient,
    piece_picks: int = PIECE_PICKS,
    implementation: str | None = None,
) -> tuple[Float[Array, "n d"], Bool[Array, " n"]]:
    """Adds row gradients to a dense gradient and a mask of the rows that were picked (whose gradient may be zero).

    Gradients are gathered, sorted and added one after the other, at most `piece_picks` picks at a time, so that the sum
    is always formed in the same order, in float32 or wider. `gather` is applied to each gradient when its turn comes,
    for example to collect the picks of other devices.
    """
    gradients = vary_together(list(gradients))
    total, touched = vary_like(start, gradients)
    num_rows = total.shape[0]
    # Gradient descent at a rate of -1 adds the gradient.
    add = RowRule(kind="sgd")

    def add_piece(total: Array, gradient: RowGradient, start: Array | int, size: int) -> Array:
        piece = RowGradient(*(jax.lax.dynamic_slice_in_dim(factor, start, size) for factor in gradient))
        return row_update(total, {}, [piece], add, row_step(-1, 0), implementation=implementation)[0]

    for gradient in gradients:
        # Otherwise XLA might gather and sort the picks of all before it adds the first.
        total, touched, gradient = jax.lax.optimization_barrier((total, touched, gradient))
        gradient = gather(gradient).existing(num_rows)
        touched = touched.at[gradient.indices.reshape(-1)].set(True)
        if not gradient.indices.size:
            continue
        size = piece_tokens(*gradient.indices.shape, piece_picks)
        whole, rest = divmod(gradient.indices.shape[0], size)
        add_nth = lambda number, total, of=gradient, size=size: add_piece(total, of, number * size, size)
        total = jax.lax.fori_loop(0, whole, add_nth, total)
        total = add_piece(total, gradient, whole * size, rest) if rest else total
    return total, touched


def piece_tokens(num_tokens: int, picks: int, piece_picks: int = PIECE_PICKS) -> int:
    """Tokens whose picks are sorted at once."""
    return min(num_tokens, max(1, piece_picks // picks))


def update_touched(
    table: Float[Array, "n d"],
    state: TableState,
    gradient: Float[Array, "n d"],
    touched: Bool[Array, " n"],
    rule: RowRule,
    step: RowStep,
    *,
    reduce: Callable[[Array], Array] = lambda gradient: gradient,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Float[Array, "n d"], TableState]:
    """`row_update` of the touched rows by a dense gradient, a block of rows at a time, in place if donated.

    Gradient and touched rows are as returned by `summed`. `reduce` is applied to the gradient of every block, for
    example to add those of other devices.
    """
    num_rows, num_columns = table.shape
    rows = max(1, min(num_rows, block_bytes // (num_columns * gradient.dtype.itemsize)))
    columns = step.first_column + jnp.arange(num_columns, dtype=jnp.int32)

    def update_block(number: Array, carry: tuple[Array, TableState]) -> tuple[Array, TableState]:
        table, state = carry
        # The last block may overlap the one before; rows that were updated already are left alone.
        start = jnp.minimum(number * rows, num_rows - rows)
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, rows)
        place = start + jnp.arange(rows)
        write = (cut(touched) & (place >= number * rows) & step.ok)[:, None]
        old, old_state = cut(table), {name: cut(array) for name, array in state.items()}
        new, new_state = rule.apply(old.astype(gradient.dtype), old_state, reduce(cut(gradient)), step)
        new = round_to(new, table.dtype, rule.stochastic_rounding, step.seed, step.step, place, columns)
        put = lambda array, new, old: jax.lax.dynamic_update_slice_in_dim(array, jnp.where(write, new, old), start, 0)
        return put(table, new, old), {name: put(state[name], new_state[name], old_state[name]) for name in state}

    carry = vary_like((table, state), (table, state, gradient, touched, step))
    return jax.lax.fori_loop(0, -(-num_rows // rows), update_block, carry)
