"""Cases of decode attention: see `memjax.ops.specs`."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from memjax.ops.decode_attention.api import decode_step
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """New tokens over caches of different lengths, whole or a window, with and without rotary positions."""
    keys, values, joined = draw.normal(3, 2, 96, 16), draw.normal(3, 2, 96, 16), draw.normal(3, 8 * 16)
    positions, angles = jnp.asarray([95, 0, 39], jnp.int32), draw.normal(3, 8)
    rotation = (jnp.cos(angles), jnp.sin(angles))

    def step(rotation: Any, window: int | None, name: str) -> Any:
        return decode_step(joined, keys, values, positions, rotation, window=window, implementation=name)

    return {
        "step": Case(partial(step, rotation, None)),
        "window": Case(partial(step, rotation, 5)),
        "no positions": Case(partial(step, None, None)),
    }
