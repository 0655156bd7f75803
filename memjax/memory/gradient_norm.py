"""The norm of a table's gradient, which is never formed: what gradients are clipped by."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.memory.sharded import RowSum, table_shards, update_rows, update_rows_by_sum
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.sharding.axes import split_columns


def columns_per_state(width: int) -> int:
    """The most columns of a row, up to 256, that share a second moment on whichever device has them."""
    shards = table_shards()
    return math.gcd(256, width if width % shards else width // shards)


def squared_norm(
    table: Float[Array, "n d"],
    gradients: Sequence[RowGradient] | RowSum,
    *,
    collective: Literal["auto", "all_gather", "all_reduce"] = "auto",
    implementation: str | None = None,
) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """The table as it was, and the squared Euclidean norm of its gradient, which costs as much as an update.

    The update that measures passes the table on, so that what comes after it is still in place.
    """
    columns = columns_per_state(table.shape[1])
    rule, step = RowRule(kind="rowwise_norm", state_columns=columns, stochastic_rounding=False), row_step(0, 0)
    state = jax.tree.map(split_columns, rule.init(table.shape[0], table.shape[1], table.dtype))
    if isinstance(gradients, RowSum):
        table, state = update_rows_by_sum(table, state, gradients, rule, step)
    else:
        table, state = update_rows(
            table, state, gradients, rule, step, collective=collective, implementation=implementation
        )
    return table, columns * jnp.sum(state["second_moment"])
