"""The optimizers of table rows, as arithmetic on a few rows at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from memjax.config.section import BelowOne, Positive, Section
from memjax.ops.precision import accumulator

Kind = Literal["rowwise_adam", "rowwise_adagrad", "adam", "sgd"]

_MOMENT_DTYPES = ("float32", "bfloat16", "float64")
"""Types with enough exponent bits that squares of gradients do not underflow."""

TableState = dict[str, jax.Array]
"""Optimizer state of a table: arrays with a row for every row of the table."""


class RowStep(NamedTuple):
    """Scalars of one update, traced so that steps share a program."""

    lr: Float[Array, ""]
    """Learning rate of this step."""
    step: Int[Array, ""]
    """Index of the step, from 0."""
    ok: Bool[Array, ""]
    """If false, nothing is written: the gradient is not finite."""
    seed: UInt32[Array, ""]
    """Seed of the stochastic rounding; differs from table to table."""
    first_column: Int[Array, ""]
    """First column of this shard in the whole table, so that every mesh draws the same random bits."""


def row_step(
    lr: ArrayLike, step: ArrayLike, *, ok: ArrayLike = True, seed: ArrayLike = 0, first_column: ArrayLike = 0
) -> RowStep:
    """A RowStep from Python numbers or arrays."""
    return RowStep(
        jnp.asarray(lr, accumulator(jnp.result_type(float))),
        jnp.asarray(step, jnp.int32),
        jnp.asarray(ok, bool),
        jnp.asarray(seed, jnp.uint32),
        jnp.asarray(first_column, jnp.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowRule(Section):
    """An optimizer that touches only the rows that were read (lazy: other rows and their state stay as they are).

    rowwise_adam: v = mean(g^2) over `state_columns` neighbouring columns at the first touch, then beta2 v + (1 - beta2)
    mean(g^2); row -= lr g / (sqrt(v) + eps). No first moment, no bias correction (the first touch needs none).
    rowwise_adagrad: v += mean(g^2), otherwise the same. adam: per element, bias-corrected for the index of the step.
    sgd: row -= lr g.

    Raises:
        ValueError: `kind` is unknown, or a number is out of its range.
    """

    kind: Kind = "rowwise_adam"
    beta1: BelowOne[float] = 0.9
    beta2: BelowOne[float] = 0.99
    eps: Positive[float] = 1e-8
    state_columns: Positive[int] = 256
    """Neighbouring columns that share a second moment (rowwise_*); must divide the columns of the table."""
    moment_dtype: DTypeLike = jnp.float32
    """Type of adam's moments."""
    stochastic_rounding: bool = True
    """Round bfloat16 rows at random, so that steps below half a unit in the last place are not lost."""

    def problems(self) -> Iterator[str]:
        try:
            is_known = self.moment_dtype is not None and jnp.dtype(self.moment_dtype).name in _MOMENT_DTYPES
        except TypeError:
            is_known = False
        if not is_known:
            yield f"moment_dtype={self.moment_dtype!r} must be one of {', '.join(_MOMENT_DTYPES)}"

    def init(self, num_rows: int, num_columns: int, dtype: DTypeLike = jnp.float32) -> TableState:
        """The state before the first update, of a table of the given shape and type.

        Raises:
            ValueError: state_columns does not divide num_columns.
        """
        if self.kind == "sgd":
            return {}
        if self.kind == "adam":
            # One array each: they are donated, and an array cannot be donated twice.
            return {
                "first_moment": jnp.zeros((num_rows, num_columns), self.moment_dtype),
                "second_moment": jnp.zeros((num_rows, num_columns), self.moment_dtype),
            }
        if num_columns % self.state_columns:
            raise ValueError(f"state_columns={self.state_columns} must divide the table's {num_columns} columns")
        return {"second_moment": jnp.zeros((num_rows, num_columns // self.state_columns), accumulator(dtype))}

    def apply(
        self, rows: Float[Array, "u d"], state: TableState, gradients: Float[Array, "u d"], step: RowStep
    ) -> tuple[Float[Array, "u d"], TableState]:
        """New rows and state of touched rows. Rows and gradients are float32 or wider; the state keeps its types."""
        lr = step.lr.astype(rows.dtype)
        if self.kind == "sgd":
            return rows - lr * gradients, {}
        if self.kind == "adam":
            first, second = (state[name].astype(rows.dtype) for name in ("first_moment", "second_moment"))
            first = self.beta1 * first + (1 - self.beta1) * gradients
            second = self.beta2 * second + (1 - self.beta2) * gradients**2
            count = (step.step + 1).astype(rows.dtype)
            corrected = jnp.sqrt(second / (1 - self.beta2**count))
            new = rows - lr * first / (1 - self.beta1**count) / (corrected + self.eps)
            moments = {"first_moment": first, "second_moment": second}
            return new, {name: moment.astype(self.moment_dtype) for name, moment in moments.items()}

        blocks = gradients.reshape(gradients.shape[0], -1, self.state_columns)
        square, old = jnp.mean(blocks**2, axis=-1), state["second_moment"]
        if self.kind == "rowwise_adagrad":
            second = old + square
        else:
            second = jnp.where(old == 0, square, self.beta2 * old + (1 - self.beta2) * square)
        scaled = blocks / (jnp.sqrt(second)[..., None] + self.eps)
        return rows - lr * scaled.reshape(rows.shape), {"second_moment": second.astype(old.dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NormRule(RowRule):
    """Measures gradients without training: v += mean(g^2) over `state_columns`, and rows stay (see `gradient_norm`)."""

    kind: Literal["rowwise_norm"] = "rowwise_norm"  # pyright: ignore[reportIncompatibleVariableOverride]  # no Kind
    stochastic_rounding: bool = False

    def apply(
        self, rows: Float[Array, "u d"], state: TableState, gradients: Float[Array, "u d"], step: RowStep
    ) -> tuple[Float[Array, "u d"], TableState]:
        """The rows as they were, and the state with the gradients' mean squares added."""
        blocks, old = gradients.reshape(gradients.shape[0], -1, self.state_columns), state["second_moment"]
        return rows, {"second_moment": (old + jnp.mean(blocks**2, axis=-1)).astype(old.dtype)}
