"""Public API of the row update: checks and dispatch."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import NormRule, RowRule, RowStep, TableState
from memjax.ops.shapes import require

_SMALL_TABLE_BYTES = 1 << 24
"""Up to this size the reference is faster than the xla form, whose sort alone takes longer on a CPU."""


def row_update(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Iterable[RowGradient],
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
        TypeError: step is not a RowStep, or rule is not a RowRule.
        ValueError: there is no gradient, shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    gradients = list(gradients)
    if not gradients or not all(isinstance(gradient, RowGradient) for gradient in gradients):
        raise ValueError("row_update needs a list of at least one RowGradient")
    if not isinstance(step, RowStep):
        raise TypeError(f"row_update: step must come from memjax.row_step(lr, step), found {type(step).__name__}")
    table, state, gradients = jax.tree.map(jnp.asarray, (table, state, gradients))
    require("row_update", table.ndim == 2, "table must be [slots, width]", table=table)
    for gradient in gradients:
        gradient.check(table.shape[1])
    check_state(table, state, rule)
    require("row_update", all(field.shape == () for field in step), "a step has scalars", **step._asdict())
    name = dispatch.choose("row_update", implementation, table.dtype)
    if name == "triton" and type(rule) not in (RowRule, NormRule):
        # The kernel implements only the package's own rules.
        if implementation:
            raise NotImplementedError(f"row_update: implementation='triton' has no kernel for {type(rule).__name__}")
        name = "xla"
    if (
        implementation is None
        and name == "xla"
        and table.size * accumulator(table.dtype).itemsize <= _SMALL_TABLE_BYTES
    ):
        name = "reference"
    with_picks = [gradient.existing(table.shape[0]) for gradient in gradients if gradient.indices.size]
    if not with_picks or not table.size:
        return table, state
    arguments = vary_together((table, state, with_picks, step))
    table, state, with_picks, step = arguments
    return dispatch.load("row_update", name).row_update(table, state, with_picks, rule, step)


def check_state(table: Float[Array, "n d"], state: TableState, rule: RowRule) -> None:
    """Raises ValueError unless the state is the rule's for this table of floats; TypeError if rule is not a RowRule.

    Updates of an integer table would be truncated to nothing.
    """
    if not isinstance(rule, RowRule):
        raise TypeError(f"row_update: rule must be a memjax.RowRule, found {type(rule).__name__}")
    is_real = jnp.issubdtype(table.dtype, jnp.floating)
    require("row_update", is_real, "the table must hold floating-point numbers", table=table)
    slots, width = table.shape
    expected = jax.eval_shape(lambda: rule.init(slots, width, table.dtype))
    fits = {name: array.shape for name, array in state.items()} == {name: a.shape for name, a in expected.items()}
    if not fits:
        shapes = {name: list(array.shape) for name, array in state.items()}
        needed = {name: list(array.shape) for name, array in expected.items()}
        raise ValueError(
            f"row_update: a state of shapes {shapes} is not that of {rule.kind} for a table {list(table.shape)}, which "
            f"has {needed}; make it with rule.init"
        )
