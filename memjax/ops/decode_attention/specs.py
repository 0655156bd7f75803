"""Cases of decode attention: see `memjax.ops.specs`."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from memjax.ops.decode_attention.api import decode_attention, decode_step
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """Attention over caches of different lengths, whole or a window, and a step that writes its entries first."""
    keys, values, query = draw.normal(3, 2, 96, 16), draw.normal(3, 2, 96, 16), draw.normal(3, 4, 16)
    lengths, joined, angles = jnp.asarray([96, 1, 40], jnp.int32), draw.normal(3, 8 * 16), draw.normal(3, 8)
    rotation = (jnp.cos(angles), jnp.sin(angles))

    def attend(window: int | None, name: str) -> Any:
        return decode_attention(query, keys, values, lengths, window=window, implementation=name)

    return {
        "attention": Case(partial(attend, None)),
        "window": Case(partial(attend, 5)),
        "step": Case(lambda name: decode_step(joined, keys, values, lengths - 1, rotation, implementation=name)),
    }
