"""What the trainings of all experiments share: rates that are arguments of a compiled step, and greedy answers."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memjax.config.optim import ScheduleConfig
from memjax.config.run import RunConfig
from memjax.models.decoder import Decoder
from memjax.training.optimizer import make_schedule
from memjax.training.program import TrainProgram

WARMUP_STEPS, FINAL_FRACTION = 100, 0.05


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
