"""The optimizer of the tables."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from memjax.config.optim import TableOptimConfig
from memjax.memory import sharded
from memjax.models.parts import Tables
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.training.optimizer import make_schedule


@dataclasses.dataclass(frozen=True)
class TableOptimizer:
    """Updates every table once per step: rows in place where `update_rows` is used, whole tables in the dense modes."""

    config: TableOptimConfig
    steps: int
    seed: int
    row_exchange: Literal["auto", "factored", "dense"] = "auto"
    """As in `sharded.update_rows`."""
    implementation: str | None = None
    """Of `row_update`."""

    @property
    def schedule(self) -> optax.Schedule:
        """The tables' own learning rate, by step."""
        return make_schedule(self.config, self.steps)

    def rule(self, width: int) -> RowRule:
        """The row optimizer of a table with rows of some width (not for the dense modes)."""
        return RowRule(
            kind=self.config.optimizer,  # pyright: ignore[reportArgumentType]  # the dense modes never come here
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            state_columns=self.config.columns_per_state(width),
            moment_dtype=jnp.dtype(self.config.moment_dtype),
            stochastic_rounding=self.config.stochastic_rounding,
        )

    def init(self, tables: Tables) -> dict[str, Any]:
        """State before the first step, by pool."""
        if self.config.is_dense:
            return {pool: self._optax.init(table) for pool, table in tables.items()}
        return {
            pool: self.rule(table.shape[1]).init(table.shape[0], table.shape[1], table.dtype)
            for pool, table in tables.items()
        }

    def update_rows(
        self,
        tables: Tables,
        state: Mapping[str, Any],
        gradients: Mapping[str, Sequence[RowGradient]],
        step: Array,
        ok: Array,
    ) -> tuple[Tables, dict[str, Any]]:
        """Tables and state after a step; as they were where ok is false."""
        new_tables, new_state = {}, {}
        for pool, table in tables.items():
            # Each pool rounds with bits of its own.
            now = row_step(self.schedule(step), step, ok=ok, seed=zlib.crc32(f"{self.seed} {pool}".encode()))
            new_tables[pool], new_state[pool] = sharded.update_rows(
                table,
                state[pool],
                gradients[pool],
                self.rule(table.shape[1]),
                now,
                exchange=self.row_exchange,
                implementation=self.implementation,
            )
        return new_tables, new_state

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
