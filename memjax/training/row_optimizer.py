"""Table optimizers from the config: row-sparse, or dense for comparison."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from memjax.config.optim import TableOptimConfig
from memjax.memory.row_grad_reduce import CollectiveOption
from memjax.memory.row_optimizer import RowOptimizer
from memjax.ops.precision import accumulator
from memjax.ops.row_update.rules import RowRule
from memjax.training.optimizer import at_step


@dataclasses.dataclass(frozen=True)
class DenseTableOptimizer:
    """The dense modes: plain optax on a gradient of the table's size, with the interface of `RowOptimizer`."""

    learning_rate: optax.Schedule
    make: Callable[[optax.Schedule], optax.GradientTransformation]

    def rate(self, step: Array) -> ArrayLike:
        return self.learning_rate(step)

    def init(self, rows: Float[Array, "n d"]) -> optax.OptState:
        return self.make(self.learning_rate).init(rows)

    def squared_norm(
        self, rows: Array, gradient: Float[Array, "n d"], *, ok: ArrayLike = True
    ) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
        """The unchanged rows, and the squared norm of their gradient; `ok` is not needed."""
        del ok
        return rows, jnp.sum(jnp.square(gradient.astype(accumulator(gradient.dtype))))

    @staticmethod
    def scaled(gradient: Float[Array, "n d"], factor: Array) -> Float[Array, "n d"]:
        return gradient * factor.astype(gradient.dtype)

    def update(
        self, name: str, rows: Array, state: Any, gradient: Float[Array, "n d"], *, step: Array, ok: Array
    ) -> tuple[Float[Array, "n d"], Any]:
        """The updated table and its state; unchanged if ok is false."""
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, after = self.make(self.learning_rate).update(gradient, at_step(state, step), rows)
            updated = jnp.asarray(optax.apply_updates(rows, updates))
        keep = lambda new, old: jnp.where(ok, new, old)
        return keep(updated, rows), jax.tree.map(keep, after, state)


def make_table_optimizer(
    config: TableOptimConfig,
    learning_rate: optax.Schedule,
    *,
    seed: int,
    collective: CollectiveOption = "auto",
    implementation: str | None = None,
) -> RowOptimizer | DenseTableOptimizer:
    """The optimizer of all tables; see `RowOptimizer` for the arguments."""
    if config.optimizer == "dense_sgd":
        return DenseTableOptimizer(learning_rate, optax.sgd)
    if config.optimizer == "dense_adam":
        adam = partial(optax.adam, b1=config.beta1, b2=config.beta2, eps=config.eps)
        return DenseTableOptimizer(learning_rate, adam)
    rule = RowRule(
        kind=config.optimizer,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        state_columns=config.state_columns or 256,
        moment_dtype=jnp.dtype(config.moment_dtype),
        stochastic_rounding=config.stochastic_rounding,
    )
    return RowOptimizer(learning_rate, rule, seed, collective, implementation)
