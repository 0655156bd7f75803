"""The training loop shared by all experiments: the library's step, timed and measured.

Learning rates are arguments of the compiled program, not constants, so that all rates, lengths and seeds of a model
share one compilation.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memjax.config.optim import ScheduleConfig
from memjax.config.run import RunConfig
from memjax.models.counts import count_parameters, training_flops
from memjax.models.decoder import Decoder
from memjax.training.compiler import compiler_options
from memjax.training.optimizer import make_schedule
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState
from memjax.training.step import Batch, train_step

WARMUP_STEPS, FINAL_FRACTION = 100, 0.05
LAST_POINTS = 3
"""The measures taken only at the end take about as long as this many points of the curve."""


class OutOfTime(Exception):
    """A run would not end before its deadline."""


class Rates(NamedTuple):
    """The peak learning rates of a run; families without tables ignore `table_lr`."""

    lr: float
    table_lr: float


def require_unit_rates(config: RunConfig) -> None:
    """Rejects a config whose learning rates are not constant and 1; the rates of a run multiply them."""
    for name, rate in (("optim", config.optim), ("optim.table", config.optim.table)):
        if (rate.lr, rate.schedule, rate.warmup_steps) != (1.0, "constant", 0):
            raise ValueError(f"{name} must have lr=1, schedule=constant, warmup_steps=0: rates are given to `run`")


def at_rates(program: TrainProgram, rates: Rates) -> TrainProgram:
    """The program at given rates, which may be traced: AdamW's update, including decay, is linear in the rate."""
    optimizer = optax.chain(program.optimizer, optax.scale(rates.lr))
    table_optimizer = dataclasses.replace(program.table_optimizer, learning_rate=lambda _: rates.table_lr)
    return dataclasses.replace(program, optimizer=optimizer, table_optimizer=table_optimizer)


@functools.lru_cache(maxsize=64)
def rate_by_step(rate: float, steps: int, warmup_steps: int = WARMUP_STEPS) -> np.ndarray:
    """The library's cosine schedule with warm-up, evaluated at every step."""
    config = ScheduleConfig(lr=rate, warmup_steps=warmup_steps, final_fraction=FINAL_FRACTION)
    return np.asarray(jax.vmap(make_schedule(config, steps))(jnp.arange(steps)), np.float32)


def write_greedily(model: Decoder, tokens: Array, begins: Array, count: int) -> Array:
    """Replaces `count` tokens of each row, from `begins` on, by greedy decoding."""
    rows, places = jnp.arange(len(tokens)), jnp.arange(tokens.shape[1])[None, :]

    def one(step: Array, tokens: Array) -> Array:
        place = begins + step
        hidden = model.hidden(tokens[:, :-1])[0]
        # Only one position per row: logits at all positions would be the largest array.
        best = jnp.argmax(model.logits(hidden[rows, jnp.minimum(place, tokens.shape[1] - 1) - 1]), axis=-1)
        return tokens.at[rows, place].set(best.astype(tokens.dtype), mode="drop")

    return jax.lax.fori_loop(0, count, one, jnp.where(places < begins[:, None], tokens, 0))


class Trained(NamedTuple):
    """A trained model, its curve, and the training part of its result."""

    state: TrainState
    curve: list[dict[str, Any]]
    result: dict[str, Any]


class Trainer:
    """A model's compiled programs, for any rates, seeds and lengths, with many steps per call."""

    def __init__(self, config: RunConfig, program: TrainProgram):
        """The config's learning rates must be constant and 1; the rates of a run multiply them."""
        require_unit_rates(config)
        self.config, self.program = config, program
        self.options: dict[str, Any] = {"compiler_options": compiler_options(jax.default_backend(), 1)}
        begun = at_rates(program, Rates(1.0, 1.0))
        self._init = jax.jit(lambda key: begun.begin(*begun.parts.init(key)), **self.options)
        self._steps = jax.jit(self._run_steps, donate_argnums=0, **self.options)

    def step_of(self, data: Any, rows: Array) -> tuple[TrainProgram, Batch]:
        """The program of a step, and the batch of the given rows."""
        raise NotImplementedError

    def train(
        self,
        data: Any,
        order: np.ndarray,
        rates: np.ndarray,
        measure: Callable[[TrainState], dict[str, Any]],
        *,
        chunk: int,
        points: Collection[int],
        seed: int,
        deadline: float | None,
        tell: Callable[[int, dict[str, Any], float, float], None],
    ) -> Trained:
        """Trains a model and measures it at several points.

        Args:
            data: arrays on the device, from which `step_of` makes batches.
            order: row indices of each step, [steps, rows].
            rates: learning rates of each step, [steps, 2].
            measure: returns the measures of a point; its time does not count as training.
            chunk: steps per compiled call.
            points: steps after which the model is measured, multiples of `chunk`.
            seed: of the initialisation.
            deadline: `time.time()` by which the run must have ended.
            tell: receives the step, the point, tokens/s and the remaining seconds.

        Raises:
            OutOfTime: the deadline would be missed.
        """
        began, steps = time.perf_counter(), len(order)
        state = jax.block_until_ready(self._init(jax.random.key(seed)))
        length = self.config.data.sequence_length
        tokens_per_step = self.config.data.batch_size * length
        flops_per_token = training_flops(self.program.parts, length).total
        curve: list[dict[str, Any]] = []
        compiling, training, measuring, speed = 0.0, 0.0, 0.0, 0.0
        for done in range(chunk, steps + 1, chunk):
            started = time.perf_counter()
            part = slice(done - chunk, done)
            state, loss = self._steps(state, data, order[part], rates[part])
            loss = float(loss)
            # The first call includes compilation, so it does not count for the speed.
            if done == chunk:
                compiling = time.perf_counter() - began
            else:
                training += time.perf_counter() - started
                speed = tokens_per_step * (done - chunk) / training
            seconds_left = tokens_per_step * (steps - done) / speed if speed else 0.0
            points_left = sum(point > done for point in points) + LAST_POINTS
            seconds_left += measuring / max(1, len(curve)) * points_left
            if deadline is not None and time.time() + seconds_left > deadline:
                raise OutOfTime(f"step {done}/{steps}: {seconds_left:.0f} s more are needed")
            if done in points:
                started, tokens = time.perf_counter(), done * tokens_per_step
                point = {"step": done, "tokens": tokens, "flops": tokens * flops_per_token}
                curve.append(point | {"loss": loss if math.isfinite(loss) else None} | measure(state))
                measuring += time.perf_counter() - started
                tell(done, curve[-1], speed, seconds_left)
                if done < steps:
                    state = dataclasses.replace(state, reads=self.program.no_reads())
        counts = count_parameters(self.program.parts)
        result = {
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "training_flops": steps * tokens_per_step * flops_per_token,
            "flops_per_token": flops_per_token,
            "parameters": dataclasses.asdict(counts) | {"total": counts.total},
            "healthy": bool(state.healthy),
            "curve": curve,
            "compile_seconds": round(compiling, 1),
            "training_seconds": round(training, 2),
            "evaluation_seconds": round(measuring, 1),
            "tokens_per_second": round(speed),
        }
        return Trained(state, curve, result)

    def _run_steps(self, state: TrainState, data: Any, order: Array, rates: Array) -> tuple[TrainState, Array]:
        """Runs several steps; returns the state and the mean loss."""

        def one(state: TrainState, now: tuple[Array, Array]) -> tuple[TrainState, Array]:
            program, batch = self.step_of(data, now[0])
            state, metrics = train_step(at_rates(program, Rates(*now[1])), state, batch)
            return state, metrics["train/loss"]

        state, losses = jax.lax.scan(one, state, (order, rates))
        return state, losses.mean()
