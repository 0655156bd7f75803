"""The optimizer of the tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from memjax.config.optim import TableOptimConfig
from memjax.memory.row_optimizer import RowOptimizer
from memjax.models.parts import Tables
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule


@dataclasses.dataclass(frozen=True)
class TableOptimizer:
    """Updates every table once per step: the rows that were read, or whole tables in the dense modes."""

    config: TableOptimConfig
    schedule: optax.Schedule
    """The tables' own learning rate, by step."""
    seed: int
    exchange: Literal["auto", "all_gather", "all_reduce"] = "auto"
    """As in `sharded.update_rows`."""
    implementation: str | None = None
    """Of `row_update`."""

    @property
    def rows(self) -> RowOptimizer:
        """The optimizer of rows (not for the dense modes)."""
        rule = RowRule(
            kind=self.config.optimizer,  # pyright: ignore[reportArgumentType]  # the dense modes never come here
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            state_columns=self.config.state_columns or 256,
            moment_dtype=jnp.dtype(self.config.moment_dtype),
            stochastic_rounding=self.config.stochastic_rounding,
        )
        return RowOptimizer(self.schedule, rule, self.seed, self.exchange, self.implementation)

    def init(self, tables: Tables) -> dict[str, Any]:
        """State before the first step, by table."""
        optimizer = self._optax if self.config.is_dense else self.rows
        return {name: optimizer.init(table) for name, table in tables.items()}

    def update_rows(
        self,
        tables: Tables,
        state: Mapping[str, Any],
        gradients: Mapping[str, Sequence[RowGradient]],
        step: Array,
        ok: Array,
    ) -> tuple[Tables, dict[str, Any]]:
        """Tables and state after a step; as they were where ok is false."""
        new = {
            name: self.rows.update(name, table, state[name], gradients[name], step=step, ok=ok)
            for name, table in tables.items()
        }
        return {name: rows for name, (rows, _) in new.items()}, {name: after for name, (_, after) in new.items()}

    def update_dense(
        self, tables: Tables, state: Mapping[str, Any], gradients: Tables, ok: Array
    ) -> tuple[Tables, dict[str, Any]]:
        """The dense modes: plain optax on whole gradients."""
        new_tables, new_state = {}, {}
        for pool, table in tables.items():
            updates, after = self._optax.update(gradients[pool], state[pool], table)
            new_tables[pool] = jnp.where(ok, jnp.asarray(optax.apply_updates(table, updates)), table)
            new_state[pool] = jax.tree.map(lambda new, old: jnp.where(ok, new, old), after, state[pool])
        return new_tables, new_state

    @property
    def _optax(self) -> optax.GradientTransformation:
        if self.config.optimizer == "dense_sgd":
            return optax.sgd(self.schedule)
        return optax.adam(self.schedule, b1=self.config.beta1, b2=self.config.beta2, eps=self.config.eps)
