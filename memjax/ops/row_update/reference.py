"""The definition of the row update: on the whole table, masked to the rows that were read."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rounding import round_to
from memjax.ops.row_update.rules import RowRule, RowStep, TableState


def row_update(
    table: Float[Array, "n d"], state: TableState, gradients: Sequence[RowGradient], rule: RowRule, step: RowStep
) -> tuple[Float[Array, "n d"], TableState]:
    """Applies the rule to the rows that any pick names, with their summed gradient; the others stay as they were."""
    num_rows, num_columns = table.shape
    touched = jnp.zeros(num_rows, bool)
    for gradient in gradients:
        touched = touched.at[gradient.indices.reshape(-1)].set(True)
    summed = sum(gradient.dense(num_rows) for gradient in gradients)
    new, new_state = rule.apply(table.astype(accumulator(table.dtype)), state, jnp.asarray(summed), step)
    columns = step.first_column + jnp.arange(num_columns, dtype=jnp.int32)
    new = round_to(new, table.dtype, rule.stochastic_rounding, step.seed, step.step, jnp.arange(num_rows), columns)
    write = (touched & step.ok)[:, None]
    return jnp.where(write, new, table), {name: jnp.where(write, new_state[name], state[name]) for name in state}
