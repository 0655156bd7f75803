"""Dot-product attention in bounded memory: cuDNN's kernel where it can run, else chunks of queries.

As in `ops.dispatch`, a requested implementation runs or raises; it is never substituted.
"""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from memjax.models.chunks import by_chunks
from memjax.ops import dispatch
from memjax.ops.precision import accumulator

IMPLEMENTATIONS = ("cudnn", "chunked")
"""In order of preference."""

SEEN_BY_ALL = -1
"""The segment of tokens that those of every segment see."""
SCORE_BYTES = 1 << 28
"""Bytes of scores per device that are held at once."""

_FEW_SCORE_BYTES = 1 << 25
"""Up to so many scores over a cache XLA's attention is faster: on an H200, 5.5 ms against 6.2 for a prompt's last 128
tokens over 4,096 in 24 layers, but 21 ms against 15 for eight such prompts."""


def choose(wanted: str | None, dtype: DTypeLike, head_dim: int, length: int) -> str:
    """The name of the implementation that runs, for queries of this type and width and rows of `length` tokens.

    `wanted` is one of IMPLEMENTATIONS; None takes the fastest that can run.

    Raises:
        ValueError: `wanted` is unknown.
        NotImplementedError: `wanted` is known but cannot run here; the message says why.
    """
    if wanted is None:
        return "chunked" if why_not("cudnn", dtype, head_dim, length) else "cudnn"
    return dispatch.named("attention", wanted, IMPLEMENTATIONS, lambda name: why_not(name, dtype, head_dim, length))


def why_not(name: str, dtype: DTypeLike, head_dim: int, length: int) -> str | None:
    """The reason why an implementation cannot run here; None if it can."""
    if name != "cudnn":
        return None
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, found {jax.default_backend()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
    device: Any = jax.devices()[0]
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (8, 0):
        return f"needs compute capability 8.0, found {device.compute_capability}"
    widest = 256 if capability >= (9, 0) else 128
    if head_dim % 8 or head_dim > widest:
        return f"needs heads whose width is a multiple of 8 and at most {widest}, found {head_dim}"
    if length % 2:
        return f"needs an even number of tokens in a row, found {length}"
    return None


def self_attention(
    query: Float[Array, "b s n h"],
    keys: Float[Array, "b s kv h"],
    values: Float[Array, "b s kv h"],
    *,
    segments: Int[Array, "b s"] | None,
    window: int | None,
    implementation: str,
    max_score_bytes: int = SCORE_BYTES,
) -> Float[Array, "b s n h"]:
    """Each token attends to itself and the tokens before it, within its segment and the nearest `window` tokens.

    All segments see tokens of the segment `SEEN_BY_ALL`.
    """
    if implementation == "chunked":
        positions = jnp.arange(query.shape[1])[None, :]
        return attention(
            query, keys, values, positions=positions, segments=segments, window=window, max_score_bytes=max_score_bytes
        )
    mask = None if segments is None else _same(segments[:, None], segments[:, None])
    nearest = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, keys, values, mask=mask, is_causal=True, local_window_size=nearest, implementation="cudnn"
    )


def cached_attention(
    query: Float[Array, "b q n h"],
    keys: Float[Array, "b k kv h"],
    values: Float[Array, "b k kv h"],
    *,
    positions: Int[Array, "b q"],
    window: int | None,
    implementation: str | None,
) -> Float[Array, "b q n h"]:
    """Queries at `positions` of cached keys attend to those up to their own, within the nearest `window`.

    By cuDNN if it can run and is faster, and the implementation is not "chunked". Values must be finite.
    """
    scores = _score_bytes(query, keys)
    # Symbolic sizes (`jax.export`) cannot be compared.
    is_small = jax.export.is_symbolic_dim(scores) or scores <= _FEW_SCORE_BYTES
    cannot = lambda length: why_not("cudnn", query.dtype, query.shape[3], length)
    if implementation == "chunked" or is_small or cannot(query.shape[1]) or cannot(keys.shape[1]):
        return attention(query, keys, values, positions=positions, window=window)
    seen = _seen(positions, keys.shape[1], None, window)
    return jax.nn.dot_product_attention(query, keys, values, mask=seen, implementation="cudnn")


def attention(
    query: Float[Array, "b q n h"],
    keys: Float[Array, "b k kv h"],
    values: Float[Array, "b k kv h"],
    *,
    positions: Integer[Array, "#b q"],
    segments: Int[Array, "b k"] | None = None,
    window: int | None = None,
    max_score_bytes: int = SCORE_BYTES,
) -> Float[Array, "b q n h"]:
    """Causal attention of queries at `positions` of the keys, a chunk of queries at a time.

    A query sees the keys up to its own position: with `segments` only those of its own segment or of `SEEN_BY_ALL`,
    with a `window` only that many of the nearest. Values must be finite, even those that no query sees. A device holds
    at most max_score_bytes of scores at once: chunks are recomputed in the backward pass.
    """
    batch, length, *_ = query.shape
    # Unsigned and narrow types would wrap in the distances to keys.
    positions = jnp.broadcast_to(positions.astype(jnp.int32), (batch, length))
    score_bytes = _score_bytes(query, keys)
    at_once = max_score_bytes * max(1, jax.sharding.get_abstract_mesh().size)
    # Symbolic sizes (`jax.export`) are unknown, so all queries are one chunk.
    count = 1 if jax.export.is_symbolic_dim(score_bytes) else max(1, min(length, -(-score_bytes // at_once)))

    def one_chunk(query: Array, positions: Array) -> Array:
        return _attend(query, keys, values, _seen(positions, keys.shape[1], segments, window))

    return by_chunks(one_chunk if count == 1 else jax.checkpoint(one_chunk), count, query, positions)


def _score_bytes(query: Array, keys: Array) -> Any:
    """Bytes of the scores of all queries and keys: an integer, or symbolic if their sizes are."""
    batch, length, heads, _ = query.shape
    return batch * length * heads * keys.shape[1] * accumulator(query.dtype).itemsize


def _seen(
    positions: Int[Array, "b q"], num_keys: int, segments: Int[Array, "b k"] | None, window: int | None
) -> Bool[Array, "b 1 q k"]:
    """Mask of the keys that each query sees."""
    distance = positions[:, :, None] - jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if segments is not None:
        seen &= _same(jnp.take_along_axis(segments, positions, axis=1), segments)
    return seen[:, None]


def _same(queries: Int[Array, "*b q"], keys: Int[Array, "*b k"]) -> Bool[Array, "*b q k"]:
    """Mask of the keys in the segment of a query, or seen by all."""
    keys = keys[..., None, :]
    return (queries[..., None] == keys) | (keys == SEEN_BY_ALL)


def _attend(query: Array, keys: Array, values: Array, seen: Bool[Array, "b 1 q k"]) -> Array:
    if query.dtype != jnp.float64:
        with jax.numpy_dtype_promotion("standard"):  # JAX mixes types here
            return jax.nn.dot_product_attention(query, keys, values, mask=seen, implementation="xla")
    # jax.nn.dot_product_attention computes its softmax in float32, whatever the inputs.
    groups = query.shape[2] // keys.shape[2]
    keys, values = jnp.repeat(keys, groups, axis=2), jnp.repeat(values, groups, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", query, keys) * query.shape[-1] ** -0.5
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), values)
