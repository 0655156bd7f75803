"""Clip the gradients of tables, jointly with the dense gradient or separately."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from memjax.models.parts import Tables
from memjax.training.optimizer import scaled
from memjax.training.program import TrainProgram


class Clipped(NamedTuple):
    """Gradients after clipping, and what measuring them has passed on."""

    dense: nnx.State
    """Gradient of the dense parameters; not clipped yet where the optimizer clips it by itself."""
    of_tables: dict[str, Any]
    """Gradients of the tables."""
    tables: Tables
    """The unchanged tables, which replace those of the state."""
    table_norm: Array | None
    """Norm of the gradients of all tables before clipping; None where they are not clipped."""


def clipped(program: TrainProgram, tables: Tables, dense: nnx.State, of_tables: dict[str, Any], norm: Array) -> Clipped:
    """The gradients, of which the dense one has the given norm, clipped by `optim.clip_tables`.

    The tables are returned because the update that measures passes them through in place: the state is donated, so
    another use of the tables it held would make XLA copy them.
    """
    config, optimizer = program.config.optim, program.table_optimizer
    if config.clip_tables is None or config.max_grad_norm is None:
        return Clipped(dense, of_tables, tables, None)
    # By depending on the dense gradient the measurement waits for the backward pass, which still reads the tables.
    ok = jnp.isfinite(norm)
    found = {name: optimizer.squared_norm(table, of_tables[name], ok=ok) for name, table in tables.items()}
    square = sum((square for _, square in found.values()), start=jnp.zeros((), norm.dtype))
    is_joint = config.clip_tables == "joint"
    factor = jnp.minimum(1, config.max_grad_norm / jnp.sqrt(square + jnp.square(norm) if is_joint else square))
    of_tables = {name: optimizer.scaled(gradient, factor) for name, gradient in of_tables.items()}
    dense = scaled(dense, factor) if is_joint else dense
    return Clipped(dense, of_tables, {name: table for name, (table, _) in found.items()}, jnp.sqrt(square))
