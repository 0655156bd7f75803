"""Settings of the optimizers of dense parameters and of tables, and of their learning rates."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from memjax.config.section import BelowOne, NotNegative, Positive, Section, Share


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """A learning-rate schedule."""

    lr: NotNegative[float]
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: cosine decay, constant, or (wsd: warm-up, stable, decay) constant with a linear
    decay over the last decay_steps; a wsd run can be continued to other lengths from before its decay."""
    warmup_steps: NotNegative[int | float] = 0.067
    """Steps over which the rate rises linearly from 0; below 1: a fraction of train.steps."""
    final_fraction: Share[float] = 0.05
    """Final rate of a cosine or wsd schedule, as a fraction of lr."""
    decay_steps: NotNegative[int | float] = 0.2
    """Final steps of a wsd schedule, over which the rate falls; below 1: a fraction of train.steps."""

    def problems(self) -> Iterator[str]:
        for name, value in (("warmup_steps", self.warmup_steps), ("decay_steps", self.decay_steps)):
            if value >= 1 and not isinstance(value, int):
                yield f"{name}={value} must be a whole number of steps, or a fraction of them below 1"

    def warmup_of(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
        return _steps(self.warmup_steps, steps)

    def decay_of(self, steps: int) -> int:
        """Number of decay steps in a run of `steps` steps, at most those left by the warm-up."""
        return min(_steps(self.decay_steps, steps), max(0, steps - self.warmup_of(steps)))


def _steps(wanted: int | float, steps: int) -> int:
    return wanted if isinstance(wanted, int) else min(round(wanted * steps), steps - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableOptimConfig(ScheduleConfig):
    """The optimizer of the value tables; it updates only the rows that were read."""

    lr: NotNegative[float] = 5e-2
    """Peak learning rate of the tables."""
    optimizer: Literal["rowwise_adam", "rowwise_adagrad", "adam", "sgd", "dense_adam", "dense_sgd"] = "rowwise_adam"
    """dense_*: plain optax with a gradient of the whole table, as a reference; its cost grows with the table."""
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
    """Round bfloat16 rows stochastically, so that small updates are not lost; other types are unaffected."""

    @property
    def is_dense(self) -> bool:
        """Whether the gradient of the whole table is computed."""
        return self.optimizer.startswith("dense_")

    def columns_per_state(self, value_dim: int) -> int:
        """Columns of a row that share one second moment."""
        return self.state_columns or math.gcd(256, value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(ScheduleConfig):
    """AdamW for the dense parameters; `table` for the value tables."""

    lr: NotNegative[float] = 6e-3
    """Peak learning rate of the dense parameters."""
    beta1: BelowOne[float] = 0.9
    """Decay of the first moment."""
    beta2: BelowOne[float] = 0.98
    """Decay of the second moment."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative[float] = 0.01
    """Decoupled weight decay of matrices; norms, biases and tables have none."""
    max_grad_norm: Positive[float] | None = 1.0
    """Maximum norm of the dense gradient; null: no clipping."""
    clip_tables: Literal["joint", "separate"] | None = None
    """Also clip the gradients of tables. joint: max_grad_norm limits one norm over all gradients; separate: it limits
    the norm of the dense gradient and, separately, that of all tables (as in the paper's code). Measuring the norm
    takes as long as updating the tables. null: clip only the dense gradient; rowwise_adam depends little on the
    gradient's scale."""
    key_lr_factor: NotNegative[float] = 0.2
    """Learning rate of memory keys and query projections, as a fraction of lr; slow keys spread reads over more
    slots."""
    ema_decay: BelowOne[float] | None = None
    """Decay of an exponential moving average of the dense parameters, such as 0.999; in the first steps it is
    (n - 1) / (n + 8). Checkpoints also store the average, and the option `ema` of evaluate, generate, serve and convert
    to-hf uses it. Tables are not averaged: that would write whole tables at every step. null: none."""
    skip_step_sigma: Positive[float] | None = None
    """Skip the update of a step whose loss or gradient norm exceeds the mean of the last 128 by more than this many
    standard deviations (6 is common); null: never. `train/skipped_steps` counts them."""
    freeze_dense: bool = False
    """Train only the memory layers and their tables; everything else is frozen and has no optimizer state."""
    table: TableOptimConfig = dataclasses.field(default_factory=TableOptimConfig)
    """The optimizer of the value tables."""

    def problems(self) -> Iterator[str]:
        yield from ScheduleConfig.problems(self)
        if self.clip_tables and self.max_grad_norm is None:
            yield f"clip_tables={self.clip_tables} needs a norm; set max_grad_norm, or clip_tables to null"
