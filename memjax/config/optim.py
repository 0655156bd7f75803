"""Settings of the optimizers of dense parameters and of tables, and of their learning rates."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from memjax.config.section import BelowOne, NotNegative, Positive, Section, Share


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """A learning rate over the steps of a run."""

    lr: NotNegative[float]
    """The highest learning rate."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """The rate after the warm-up: a cosine, constant, or (wsd: warm-up, stable, decay) constant until a linear decay
    over the last decay_steps, so that one run can be continued from before its decay with other lengths."""
    warmup_steps: NotNegative[int | float] = 0.067
    """Steps over which the rate rises from 0; a number below 1 is a share of train.steps."""
    final_fraction: Share[float] = 0.05
    """Where a cosine or wsd schedule ends, as a share of lr."""
    decay_steps: NotNegative[int | float] = 0.2
    """Last steps of a wsd schedule, over which the rate falls; a number below 1 is a share of train.steps."""

    def problems(self) -> Iterator[str]:
        """Fractional numbers of steps."""
        for name, value in (("warmup_steps", self.warmup_steps), ("decay_steps", self.decay_steps)):
            if value >= 1 and not isinstance(value, int):
                yield f"{name}={value} must be a whole number of steps, or a share of them below 1"

    def warmup_of(self, steps: int) -> int:
        """The warm-up of a run of so many steps, in steps."""
        return _steps(self.warmup_steps, steps)

    def decay_of(self, steps: int) -> int:
        """The decay of a run of so many steps, in steps: no more than the warm-up leaves."""
        return min(_steps(self.decay_steps, steps), max(0, steps - self.warmup_of(steps)))


def _steps(wanted: int | float, steps: int) -> int:
    return wanted if isinstance(wanted, int) else min(round(wanted * steps), steps - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableOptimConfig(ScheduleConfig):
    """The optimizer of the value tables: only rows that were read are touched."""

    lr: NotNegative[float] = 5e-2
    """The highest learning rate of the tables."""
    optimizer: Literal["rowwise_adam", "rowwise_adagrad", "adam", "sgd", "dense_adam", "dense_sgd"] = "rowwise_adam"
    """dense_*: plain optax on a gradient of the table's size, to compare with; it costs the whole table every step."""
    beta1: BelowOne[float] = 0.9
    """Decay of the first moment (adam, dense_adam)."""
    beta2: BelowOne[float] = 0.99
    """Decay of the second moment."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment."""
    state_columns: Positive[int] | None = None
    """Neighbouring columns of a row that share a second moment (rowwise_*); null: the largest power of two up to 256
    that divides value_dim."""
    moment_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of adam's moments."""
    stochastic_rounding: bool = True
    """Round bfloat16 rows up or down at random, so that small updates are not lost; other types are unaffected."""

    @property
    def is_dense(self) -> bool:
        """Whether the table is differentiated as a whole."""
        return self.optimizer.startswith("dense_")

    def columns_per_state(self, value_dim: int) -> int:
        """Columns of a row that share one second moment."""
        return self.state_columns or math.gcd(256, value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(ScheduleConfig):
    """AdamW for the dense parameters; `table` for the value tables."""

    lr: NotNegative[float] = 6e-3
    """The highest learning rate of the dense parameters."""
    beta1: BelowOne[float] = 0.9
    """Decay of the first moment."""
    beta2: BelowOne[float] = 0.98
    """Decay of the second moment."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative[float] = 0.01
    """Decoupled weight decay of matrices (norms, biases and tables have none)."""
    max_grad_norm: Positive[float] | None = 1.0
    """Largest norm of the dense gradient; null for no clipping."""
    clip_tables: Literal["joint", "separate"] | None = None
    """Clips the gradients of tables, too. joint: one norm of all gradients is at most max_grad_norm; separate: that of
    the dense gradient, and that of all tables together (as the paper's code does). Measuring it takes as long as
    updating the tables. null: only the dense gradient; the scale of the gradient means little to rowwise_adam."""
    key_lr_factor: NotNegative[float] = 0.2
    """Learning rate of memory keys and query projections, as a share of lr; slow keys spread the reads."""
    ema_decay: BelowOne[float] | None = None
    """Decay of an exponential moving average of the dense parameters, such as 0.999, which checkpoints keep beside them
    and `ema` of evaluate, generate, serve and convert reads; in the first steps it is (n - 1) / (n + 8). null: none.
    Tables are not averaged: that would write whole tables in every step."""
    skip_step_sigma: Positive[float] | None = None
    """Skip the update of a step whose loss or gradient norm is above the mean of the last 128 by more than so many
    of their standard deviations (6 is common); null: never. `train/skipped_steps` counts them."""
    freeze_dense: bool = False
    """Train the memory layers and their tables only; all else stays as it is, and has no optimizer state."""
    table: TableOptimConfig = dataclasses.field(default_factory=TableOptimConfig)
    """The optimizer of the value tables."""

    def problems(self) -> Iterator[str]:
        """Those of the schedule, and clipping without a norm."""
        yield from ScheduleConfig.problems(self)
        if self.clip_tables and self.max_grad_norm is None:
            yield f"clip_tables={self.clip_tables} needs a norm; set max_grad_norm, or clip_tables to null"
