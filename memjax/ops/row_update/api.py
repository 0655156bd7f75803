"""The row update as others call it."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, RowStep, TableState


def row_update(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Sequence[RowGradient],
    rule: RowRule,
    step: RowStep,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "n d"], TableState]:
    """One optimizer step on the rows that were read: the table and its state, updated.

    The gradients of all layers that read the table are summed first, in float32 or wider (their numbers of picks may
    differ), so a row is updated once however often it was read. Under `jax.jit` with table and state donated, the
    update is in place and its temporaries do not grow with the table. With `step.ok` false nothing changes.

    Raises:
        ValueError: there is no gradient, or its width is not the table's, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    if not gradients:
        raise ValueError("row_update needs at least one RowGradient")
    for gradient in gradients:
        if gradient.vectors.shape[-1] != table.shape[1]:
            raise ValueError(f"vectors of width {gradient.vectors.shape[-1]} cannot update rows of {table.shape[1]}")
    name = dispatch.choose("row_update", implementation, table.dtype)
    return dispatch.load("row_update", name).row_update(table, state, gradients, rule, step)
