"""Public API of decode attention: one new token per row over a cache, each row with its own length."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from memjax.ops import dispatch
from memjax.ops.decode_attention import step
from memjax.ops.shapes import require


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
    """softmax(query . keys * h**-0.5) . values over a cache, after the entries of the new tokens are written to it.

    Returns the attention, and the cache's keys and values. Heads come in groups of n / kv that share keys and values.
    Scores and sums are in float32 or wider. Entries beyond a row's position may hold any finite numbers.

    Args:
        joined: queries of the new tokens, then keys, then values, heads side by side: width = (n + 2 kv) h.
        keys: the cache's keys.
        values: the cache's values.
        positions: where the entries go; an entry whose position is beyond the cache is neither written nor seen.
        rotation: cosines and sines of the angles by which pairs (x[i], x[i + h/2]) of queries and keys are rotated;
            None leaves them as they are.
        window: number of latest entries to attend to; None for all.
        implementation: `triton` does all of it in one kernel, in place, and reads only filled entries; `xla` and
            `reference` read the whole cache.

    Raises:
        ValueError: shapes do not fit each other, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    (batch, kv_heads, _, width), heads = keys.shape, joined.shape[-1] // keys.shape[-1] - 2 * keys.shape[1]
    arrays = {"joined": joined, "keys": keys, "values": values}
    fits = heads > 0 and joined.shape == (batch, (heads + 2 * kv_heads) * width) and heads % kv_heads == 0
    fits = fits and values.shape == keys.shape and positions.shape == (batch,)
    rule = "joined must be [b, (n + 2 kv) h], keys and values [b, kv, s, h] with kv a divisor of n, and positions [b]"
    require("decode_step", fits, rule, **arrays, positions=positions)
    require("decode_step", keys.dtype == values.dtype == joined.dtype, "all must be of one type", **arrays)
    if rotation is not None:
        fits = all(part.shape == (batch, width // 2) for part in rotation)
        require("decode_step", fits, "cosines and sines must be [b, h / 2]", cosines=rotation[0], sines=rotation[1])
    if window is not None and window < 1:
        raise ValueError(f"decode_step: window={window} must be positive")
    name = dispatch.choose("decode_attention", implementation, joined.dtype)
    # A narrow type may not be able to count the cache's entries.
    positions = positions.astype(jnp.int32)
    if name == "triton":
        return dispatch.load("decode_attention", name).decode_step(joined, keys, values, positions, rotation, window)
    return step.decode_step(joined, keys, values, positions, rotation, window, implementation=name)
