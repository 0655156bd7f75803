"""A decoding step in parts: rotary positions, the cache's new entry, attention over the cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch


def decode_step(
    joined: Float[Array, "b width"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    positions: Int[Array, " b"],
    rotation: tuple[Float[Array, "b half"], Float[Array, "b half"]] | None,
    window: int | None,
    *,
    implementation: str,
) -> tuple[Float[Array, "b n h"], Float[Array, "b kv s h"], Float[Array, "b kv s h"]]:
    """`api.decode_step`, with the attention of the given implementation."""
    (batch, kv_heads, size, width), num_heads = keys.shape, joined.shape[1] // keys.shape[3] - 2 * keys.shape[1]
    heads = joined.reshape(batch, -1, width)
    query, key, value = jnp.split(heads, (num_heads, num_heads + kv_heads), axis=1)
    if rotation is not None:
        cos, sin = (part[:, None, :] for part in rotation)
        query, key = turn(query, cos, sin), turn(key, cos, sin)
    keys, values = (
        write(old, new[:, None], positions[:, None]) for old, new in zip((keys, values), (key, value), strict=True)
    )
    lengths = jnp.minimum(positions + 1, size)
    attend = dispatch.load("decode_attention", implementation).decode_attention
    return attend(query, keys, values, lengths, window), keys, values


def turn(x: Float[Array, "*b h"], cos: Float[Array, "*#b half"], sin: Float[Array, "*#b half"]) -> Float[Array, "*b h"]:
    """Rotates the pairs (x[i], x[i + h/2]) by angles given as cosines and sines, in x's type."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def write(
    cache: Float[Array, "b kv s h"],
    new: Float[Array, "b q kv h"],
    positions: Int[Array, "b q"],
    *,
    by_rows: bool | None = None,
) -> Float[Array, "b kv s h"]:
    """The cache with new entries at the positions of each row; those at positions beyond its end are dropped.

    A row's positions must be distinct. `by_rows` writes single rows of a flat cache: on GPUs, XLA would otherwise
    transpose the whole cache and back at each step; on CPUs, it writes one index after the other, so fewer indices are
    better. None lets the backend decide.
    """
    new, (batch, kv_heads, size, width) = new.astype(cache.dtype), cache.shape
    if by_rows is None:
        by_rows = jax.default_backend() == "gpu"
    row = jnp.arange(batch)[:, None]
    if not by_rows:
        return cache.at[row, :, positions].set(new, unique_indices=True, mode="drop")
    head = row[:, :, None] * kv_heads + jnp.arange(kv_heads)[None, None, :]
    flat = (head * size + positions[:, :, None]).reshape(-1)
    # Indices past the end are dropped; they are distinct, as unique_indices promises.
    beyond = batch * kv_heads * size + jnp.arange(flat.size, dtype=flat.dtype)
    inside = jnp.repeat((positions < size).reshape(-1), kv_heads)
    flat = jnp.where(inside, flat, beyond)
    rows = cache.reshape(-1, width).at[flat].set(new.reshape(-1, width), unique_indices=True, mode="drop")
    return rows.reshape(cache.shape)
