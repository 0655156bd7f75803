"""The norm of a table's gradient, for clipping, without forming the gradient."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from memjax.memory.row_grad_reduce import CollectiveOption
from memjax.memory.sharded import RowSum, mesh_sizes, update_rows
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import NormRule, row_step
from memjax.sharding.axes import split_columns

_MOST_COLUMNS = 1024
"""Maximum number of columns that share a sum of squares: what a Triton program processes at once."""


def columns_per_state(width: int) -> int:
    """The most columns of a row, up to 256, that can share a second moment on every device."""
    shards = mesh_sizes()["memory_axis"]
    return math.gcd(256, width if width % shards else width // shards)


def columns_per_square(width: int, shards: int) -> int:
    """The most columns of a row, up to 1024, that can share a sum of squares; all columns of a device, if they fit."""
    columns = width if width % shards else width // shards
    return next(count for count in range(min(columns, _MOST_COLUMNS), 0, -1) if columns % count == 0)


def squared_norm(
    table: Float[Array, "n d"],
    gradients: Sequence[RowGradient] | RowSum,
    *,
    ok: ArrayLike = True,
    collective: CollectiveOption = "auto",
    implementation: str | None = None,
) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """The unchanged table, and the squared Euclidean norm of its gradient.

    The norm comes from a row update that writes no rows: like any update, it sorts and sums the picks and reads their
    rows. It needs one number per row of the table, more only if a device holds over 1024 of its columns.

    The table is passed through that update and returned, so that the next update can be in place. With ok=False the
    norm is 0. If the backward pass that reads the table is in the same program, `ok` must depend on its gradients: only
    then does the update wait for those reads, so that XLA need not copy the table.
    """
    columns = columns_per_square(table.shape[1], mesh_sizes()["memory_axis"])
    rule, step = NormRule(state_columns=columns), row_step(0, 0, ok=ok)
    state = jax.tree.map(split_columns, rule.init(table.shape[0], table.shape[1], table.dtype))
    kernels = {"collective": collective, "implementation": implementation}
    table, state = update_rows(table, state, gradients, rule, step, **kernels)
    return table, columns * jnp.sum(state["second_moment"])
