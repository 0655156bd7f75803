"""What the trainings of all experiments share: the library's step at rates that are arguments, timed and measured.

Rates are arguments of the compiled program, not constants in it, so that all rates, lengths and seeds of a model share
one compilation.
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
"""Points of the curve that take about as long as what is measured at the end only."""


class OutOfTime(Exception):
    """A run would not end before its deadline."""


class Rates(NamedTuple):
    """The highest learning rates of a run; a family without tables ignores that of the table."""

    lr: float
    table_lr: float


def require_unit_rates(config: RunConfig) -> None:
    """Refuses a config whose own rates are not constant and 1: those of a run are factors on them."""
    for name, rate in (("optim", config.optim), ("optim.table", config.optim.table)):
        if (rate.lr, rate.schedule, rate.warmup_steps) != (1.0, "constant", 0):
            raise ValueError(f"{name} must have lr=1, schedule=constant, warmup_steps=0: rates are given to `run`")


def at_rates(program: TrainProgram, rates: Rates) -> TrainProgram:
    """The program at given rates, which may be traced: AdamW's step, its decay included, is linear in its rate."""
    optimizer = optax.chain(program.optimizer, optax.scale(rates.lr))
    table_optimizer = dataclasses.replace(program.table_optimizer, learning_rate=lambda _: rates.table_lr)
    return dataclasses.replace(program, optimizer=optimizer, table_optimizer=table_optimizer)


@functools.lru_cache(maxsize=64)
def rate_by_step(rate: float, steps: int, warmup_steps: int = WARMUP_STEPS) -> np.ndarray:
    """The library's own cosine with a warm-up, at every step."""
    config = ScheduleConfig(lr=rate, warmup_steps=warmup_steps, final_fraction=FINAL_FRACTION)
    return np.asarray(jax.vmap(make_schedule(config, steps))(jnp.arange(steps)), np.float32)


def write_greedily(model: Decoder, tokens: Array, begins: Array, count: int) -> Array:
    """The rows with `count` tokens from `begins` on replaced, each by the likeliest after those before it."""
    rows, places = jnp.arange(len(tokens)), jnp.arange(tokens.shape[1])[None, :]

    def one(step: Array, tokens: Array) -> Array:
        place = begins + step
        hidden = model.hidden(tokens[:, :-1])[0]
        # One position of each row: logits at all of them would be the largest array.
        best = jnp.argmax(model.logits(hidden[rows, jnp.minimum(place, tokens.shape[1] - 1) - 1]), axis=-1)
        return tokens.at[rows, place].set(best.astype(tokens.dtype), mode="drop")

    return jax.lax.fori_loop(0, count, one, jnp.where(places < begins[:, None], tokens, 0))


class Trained(NamedTuple):
    """A trained model, and what its result says of the training."""

    state: TrainState
    curve: list[dict[str, Any]]
    result: dict[str, Any]


class Trainer:
    """A model's compiled programs, for any rates, seeds and lengths: many steps for each call of the device."""

    def __init__(self, config: RunConfig, program: TrainProgram):
        """The config's own rates must be constant and 1: those of a run are factors on them."""
        require_unit_rates(config)
        self.config, self.program = config, program
        self.options = {"compiler_options": compiler_options(jax.default_backend(), 1)}
        begun = at_rates(program, Rates(1.0, 1.0))
        self._init = jax.jit(lambda key: begun.begin(*begun.parts.init(key)), **self.options)
        self._steps = jax.jit(self._run_steps, donate_argnums=0, **self.options)

    def step_of(self, data: Any, rows: Array) -> tuple[TrainProgram, Batch]:
        """The program of a step, and its batch of the rows of these numbers."""
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
        """Trains a model and measures it on the way.

        Args:
            data: arrays on the device, of which `step_of` makes batches.
            order: rows of each step, [steps, rows].
            rates: of each step, [steps, 2].
            measure: gives a point of the curve; its time is not that of the training.
            chunk: steps for each call of the device.
            points: steps after which the model is measured, multiples of `chunk`.
            seed: of the initialisation.
            deadline: `time.time()` at which the run must have ended.
            tell: takes the step, the point, tokens/s and the seconds that are left.

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
            # The first steps, with which the program was compiled, say nothing of the speed.
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
        """Steps one after the other, and the mean of their losses."""

        def one(state: TrainState, now: tuple[Array, Array]) -> tuple[TrainState, Array]:
            program, batch = self.step_of(data, now[0])
            state, metrics = train_step(at_rates(program, Rates(*now[1])), state, batch)
            return state, metrics["train/loss"]

        state, losses = jax.lax.scan(one, state, (order, rates))
        return state, losses.mean()
