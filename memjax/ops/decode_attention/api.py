"""Attention of one query a row over a cache that is filled to a length of its own, choice of the implementation."""

from jaxtyping import Array, Float, Int

from memjax.ops import dispatch


def decode_attention(
    query: Float[Array, "b n h"],
    keys: Float[Array, "b kv s h"],
    values: Float[Array, "b kv s h"],
    lengths: Int[Array, " b"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n h"]:
    """softmax(query . keys * h**-0.5) . values over the first `lengths` entries of each row, in the query's type.

    Heads come in groups of n / kv that share keys and values. Scores and sums are in float32 or wider.

    Args:
        query: of the newest token, whose own key is in the cache.
        keys: of the cache.
        values: of the cache.
        lengths: entries that each row holds, the newest token's included; at least 1. What lies behind is ignored.
        window: how many of the latest entries are seen; None for all.
        implementation: `triton` reads only what is filled; `xla` and `reference` read the whole cache.

    Raises:
        ValueError: shapes do not fit each other, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    (batch, heads, width), (_, kv_heads, size, _) = query.shape, keys.shape
    if keys.shape != (batch, kv_heads, size, width) or values.shape != keys.shape or heads % kv_heads:
        raise ValueError(
            f"decode_attention: query {query.shape}, keys {keys.shape} and values {values.shape} do not fit; they must "
            "be [b, n, h], [b, kv, s, h] and [b, kv, s, h], with kv a divisor of n"
        )
    if lengths.shape != (batch,):
        raise ValueError(f"decode_attention: lengths {lengths.shape} must be [{batch}], one for each row of the query")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window={window} must be positive")
    name = dispatch.choose("decode_attention", implementation, query.dtype)
    return dispatch.load("decode_attention", name).decode_attention(query, keys, values, lengths, window)
