"""The definition of decode attention, with each group's keys repeated for its heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


def decode_attention(
    query: Float[Array, "b n h"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    lengths: Int[Array, " b"],
    window: int | None,
) -> Float[Array, "b n h"]:
    """Computes all scores, then masks those that may not be seen."""
    wide, groups = accumulator(query.dtype), query.shape[1] // keys.shape[1]
    keys, values = (jnp.repeat(array, groups, axis=1).astype(wide) for array in (keys, values))
    scores = jnp.einsum("bnh,bnsh->bns", query.astype(wide), keys) * query.shape[-1] ** -0.5
    positions = jnp.arange(keys.shape[2])[None, None, :]
    seen = positions < lengths[:, None, None]
    if window is not None:
        seen &= positions >= lengths[:, None, None] - window
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bns,bnsh->bnh", weights, jnp.where(seen[..., None], values, 0)).astype(query.dtype)
