"""The row optimizer of tables: rule, learning rate, and seed of the rounding."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from memjax.config import checks
from memjax.memory import row_grad_reduce, sharded
from memjax.memory.gradient_norm import columns_per_state, squared_norm
from memjax.memory.sharded import RowSum
from memjax.ops import dispatch
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.rules import RowRule, TableState, row_step


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """Updates the table rows that were read, in place, without another array of the table's size.

    The exception is row gradients that are summed densely: by `all_reduce` on a mesh, or as a `RowSum`.
    """

    learning_rate: ArrayLike | Callable[[ArrayLike], ArrayLike]
    """A number, or a function of the step index, like optax schedules."""
    rule: RowRule = dataclasses.field(default_factory=RowRule)
    """The default of 256 state_columns is lowered if it does not divide the width of a table or of its shards."""
    seed: int = 0
    """Seed of the stochastic rounding; every table uses different random bits."""
    collective: row_grad_reduce.CollectiveOption = "auto"
    """How row gradients cross the `data` axis of a mesh: see `memjax.memory.sharded.update_rows`."""
    implementation: str | None = None
    """Implementation of `row_update`; None takes the fastest that can run."""

    def __post_init__(self):
        rate = self.learning_rate
        if isinstance(rate, np.ndarray | jax.Array) and rate.shape == () and not isinstance(rate, Tracer):
            # Flax's transformations hash optimizers, and arrays are not hashable.
            rate = rate.item()
            object.__setattr__(self, "learning_rate", rate)
        checks.typed(self)
        problems = dispatch.problems(self.implementation)
        if not _is_rate(rate):
            problems.append(f"learning_rate={rate!r} must be a number that is not negative, or a schedule")
        if not isinstance(self.rule, RowRule):
            problems.append(f"rule={self.rule!r} must be a memjax.RowRule")
        checks.refuse(problems)

    def rate(self, step: ArrayLike) -> ArrayLike:
        """The learning rate of a step, numbered from 0."""
        return self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate

    def init(self, rows: Float[Array, "n d"]) -> TableState:
        """A table's state before the first update.

        Raises:
            ValueError: the rule's state_columns does not divide the columns of a device.
        """
        (num_rows, width), shards = rows.shape, sharded.mesh_sizes()["memory_axis"]
        rule = self._rule(width)
        if rule.kind.startswith("rowwise_") and width % shards == 0 and width // shards % rule.state_columns:
            raise ValueError(
                f"state_columns={rule.state_columns} must divide the {width // shards} columns of a table of width "
                f"{width} that a device has (memory={shards}); set state_columns={columns_per_state(width)}, or leave "
                "it at its default, which is lowered to what fits"
            )
        return rule.init(num_rows, width, rows.dtype)

    def update(
        self,
        name: str,
        rows: Float[Array, "n d"],
        state: TableState,
        gradients: Sequence[RowGradient] | RowSum,
        *,
        step: ArrayLike,
        ok: ArrayLike = True,
    ) -> tuple[Float[Array, "n d"], TableState]:
        """A table's rows and state, updated by the gradients of all of its reads together, or by their sum (`add`).

        Steps count from 0. The random bits of the rounding depend on the table's name. If not `ok`, nothing changes.
        """
        now = row_step(self.rate(step), step, ok=ok, seed=zlib.crc32(f"{self.seed} {name}".encode()))
        kernels = {"collective": self.collective, "implementation": self.implementation}
        return sharded.update_rows(rows, state, gradients, self._rule(rows.shape[1]), now, **kernels)

    def squared_norm(
        self, rows: Float[Array, "n d"], gradients: Sequence[RowGradient] | RowSum, *, ok: ArrayLike = True
    ) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
        """The unchanged rows, which replace the given ones, and the squared norm of their gradient; 0 if not ok.

        What `ok` depends on is computed first, such as the gradients of a backward pass that reads the table in place.
        """
        kernels = {"collective": self.collective, "implementation": self.implementation}
        return squared_norm(rows, gradients, ok=ok, **kernels)

    @staticmethod
    def scaled(gradients: Sequence[RowGradient] | RowSum, factor: ArrayLike) -> Sequence[RowGradient] | RowSum:
        """The gradients times a number."""
        return gradients.scaled(factor) if isinstance(gradients, RowSum) else [row.scaled(factor) for row in gradients]

    def sums_micro_batches(self, rows: Float[Array, "n d"], gradients: Sequence[RowGradient], count: int) -> bool:
        """Whether to sum row gradients after each of `count` micro-batches; `gradients` are those of one."""
        return row_grad_reduce.sums_micro_batches(self.collective, rows, gradients, count, **sharded.mesh_sizes())

    def add(self, total: RowSum, gradients: Sequence[RowGradient]) -> RowSum:
        """The sum, initially `no_rows(rows)`, plus more row gradients."""
        return sharded.add_rows(total, gradients, implementation=self.implementation)

    def _rule(self, width: int) -> RowRule:
        columns = self.rule.state_columns
        return dataclasses.replace(self.rule, state_columns=columns_per_state(width) if columns == 256 else columns)


def _is_rate(rate: Any) -> bool:
    if callable(rate) or (isinstance(rate, Tracer) and rate.shape == ()):
        return True
    is_real = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(rate, bool)
    return is_real and bool(0 <= rate < math.inf)
