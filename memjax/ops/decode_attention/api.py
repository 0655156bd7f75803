"""Public API of decode attention: one query per row over a cache, each row with its own length."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from memjax.ops import dispatch
from memjax.ops.decode_attention import step
from memjax.ops.shapes import require


def decode_attention(
    query: Float[Array, "b n h"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    lengths: Integer[Array, " b"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n h"]:
    """softmax(query . keys * h**-0.5) . values over the first `lengths` entries of each row, in the query's type.

    Heads come in groups of n / kv that share keys and values. Scores and sums are in float32 or wider.

    Args:
        query: queries of the newest token, whose key is already in the cache.
        keys: the cache's keys.
        values: the cache's values.
        lengths: number of entries in each row, the newest token's included; at least 1. Entries beyond it may hold any
            finite numbers.
        window: number of latest entries to attend to; None for all.
        implementation: `triton` reads only filled entries; `xla` and `reference` read the whole cache.

    Raises:
        ValueError: shapes do not fit each other, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    fits = (query.ndim, keys.ndim) == (3, 4) and query.shape[::2] == keys.shape[::3] and values.shape == keys.shape
    fits = fits and query.shape[1] % keys.shape[1] == 0 and lengths.shape == query.shape[:1]
    rule = "query must be [b, n, h], keys and values [b, kv, s, h] with kv a divisor of n, and lengths [b]"
    require("decode_attention", fits, rule, query=query, keys=keys, values=values, lengths=lengths)
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window={window} must be positive")
    name = dispatch.choose("decode_attention", implementation, query.dtype)
    # A narrow type may not be able to count the cache's entries.
    lengths = lengths.astype(jnp.int32)
    return dispatch.load("decode_attention", name).decode_attention(query, keys, values, lengths, window)


def decode_step(
    joined: Float[Array, "b width"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    positions: Integer[Array, " b"],
    rotation: tuple[Float[Array, "b half"], Float[Array, "b half"]] | None,
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b n h"], Float[Array, "b kv s h"], Float[Array, "b kv s h"]]:
    """Writes the entries of new tokens to the cache and attends; returns the attention and the cache's keys and values.

    Args:
        joined: queries of the new tokens, then keys, then values, heads side by side: width = (n + 2 kv) h.
        keys: the cache's keys.
        values: the cache's values.
        positions: where the entries go; an entry whose position is beyond the cache is neither written nor seen.
        rotation: cosines and sines of the angles by which pairs (x[i], x[i + h/2]) of queries and keys are rotated;
            None leaves them as they are.
        window: number of latest entries to attend to; None for all.
        implementation: as above; `triton` does all of it in one kernel, in place.

    Raises:
        ValueError: shapes do not fit each other, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    (batch, kv_heads, _, width), heads = keys.shape, joined.shape[-1] // keys.shape[-1] - 2 * keys.shape[1]
    fits = heads > 0 and joined.shape == (batch, (heads + 2 * kv_heads) * width) and heads % kv_heads == 0
    fits = fits and values.shape == keys.shape and positions.shape == (batch,)
    rule = "joined must be [b, (n + 2 kv) h], keys and values [b, kv, s, h] with kv a divisor of n, and positions [b]"
    require("decode_step", fits, rule, joined=joined, keys=keys, values=values, positions=positions)
    if rotation is not None:
        fits = all(part.shape == (batch, width // 2) for part in rotation)
        require("decode_step", fits, "cosines and sines must be [b, h / 2]", cosines=rotation[0], sines=rotation[1])
    positions = positions.astype(jnp.int32)
    name = dispatch.choose("decode_attention", implementation, joined.dtype)
    if name == "triton" and keys.dtype == values.dtype == joined.dtype:
        return dispatch.load("decode_attention", name).decode_step(joined, keys, values, positions, rotation, window)
    return step.decode_step(joined, keys, values, positions, rotation, window, implementation=name)
