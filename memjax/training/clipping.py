"""Clipping of the gradients of tables: with those of the dense parameters, or by themselves."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from memjax.models.parts import Tables
from memjax.training.optimizer import scaled
from memjax.training.program import TrainProgram


def clipped(
    program: TrainProgram, tables: Tables, dense: nnx.State, of_tables: dict[str, Any], norm: Array
) -> tuple[nnx.State, dict[str, Any], Tables, Array | None]:
    """The gradients as `optim.clip_tables` wants them, the tables as they were, and the norm of all their gradients.

    The dense gradient, of the given norm, is left to the optimizer where it is clipped by itself.
    """
    config, optimizer = program.config.optim, program.table_optimizer
    if config.clip_tables is None or config.max_grad_norm is None:
        return dense, of_tables, tables, None
    found = {name: optimizer.squared_norm(table, of_tables[name]) for name, table in tables.items()}
    square = sum((square for _, square in found.values()), start=jnp.zeros((), norm.dtype))
    is_joint = config.clip_tables == "joint"
    factor = jnp.minimum(1, config.max_grad_norm / jnp.sqrt(square + jnp.square(norm) if is_joint else square))
    of_tables = {name: optimizer.scaled(gradient, factor) for name, gradient in of_tables.items()}
    dense = scaled(dense, factor) if is_joint else dense
    return dense, of_tables, {name: table for name, (table, _) in found.items()}, jnp.sqrt(square)
