"""Decode attention in plain XLA: two batched matmuls over the cache, with the heads of a group batched together."""

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
    """Reads the whole cache; entries that are not filled get a weight of zero."""
    (batch, heads, width), (kv_heads, size) = query.shape, keys.shape[1:3]
    wide = accumulator(query.dtype)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=wide) * width**-0.5
    positions = jnp.arange(size, dtype=jnp.int32)[None, None, None, :]
    seen = positions < lengths[:, None, None, None]
    if window is not None:
        seen &= positions >= lengths[:, None, None, None] - window
    # A finite minimum: -inf could become NaN as inf - inf.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, values, preferred_element_type=wide)
    return out.reshape(batch, heads, width).astype(query.dtype)
