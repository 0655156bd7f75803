"""Clips the gradients of tables, jointly with the dense gradient or separately."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from memjax.models.parts import Tables
from memjax.training.optimizer import scaled
from memjax.training.program import TrainProgram


class Clipped(NamedTuple):
    """Gradients after clipping, and the tables that measuring them passed through."""

    dense: nnx.State
    """Gradient of the dense parameters; not clipped yet if the optimizer clips it."""
    of_tables: dict[str, Any]
    """Gradients of the tables."""
    tables: Tables
    """The unchanged tables, to be used in place of those of the state."""
    table_norm: Array | None
    """Norm of the gradients of all tables before clipping; None if they are not clipped."""


def clipped(program: TrainProgram, tables: Tables, dense: nnx.State, of_tables: dict[str, Any], norm: Array) -> Clipped:
    """The gradients, clipped as `optim.clip_tables` says; `norm` is that of the dense gradient.

    The tables are returned because they are passed through the measurement in place: the state is donated, so any other
    use of its tables would make XLA copy them.
    """
    config, optimizer = program.config.optim, program.table_optimizer
    if config.clip_tables is None or config.max_grad_norm is None:
        return Clipped(dense, of_tables, tables, None)
    # Makes the measurement wait for the backward pass, which still reads the tables.
    ok = jnp.isfinite(norm)
    found = {name: optimizer.squared_norm(table, of_tables[name], ok=ok) for name, table in tables.items()}
    square = sum((square for _, square in found.values()), start=jnp.zeros((), norm.dtype))
    is_joint = config.clip_tables == "joint"
    factor = jnp.minimum(1, config.max_grad_norm / jnp.sqrt(square + jnp.square(norm) if is_joint else square))
    of_tables = {name: optimizer.scaled(gradient, factor) for name, gradient in of_tables.items()}
    dense = scaled(dense, factor) if is_joint else dense
    return Clipped(dense, of_tables, {name: table for name, (table, _) in found.items()}, jnp.sqrt(square))
