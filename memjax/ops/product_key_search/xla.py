"""The product-key search in plain XLA: exact, in chunks of tokens, never forming the n * n pairs."""

import inspect

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.ops.manual_axes import vary_like
from memjax.ops.precision import accumulator

CHUNK_BYTES = 1 << 26
"""Half scores per chunk of tokens."""

# Ties may come in any order here, and only the unstable form takes the fast path on GPUs; jax < 0.11 has just one form.
_TOP_K_OPTIONS = {"is_stable": False} if "is_stable" in inspect.signature(jax.lax.top_k).parameters else {}


def product_key_search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The reference's slots (equal scores in any order), best first, in chunks of `chunk_bytes` of half scores."""
    halves = _split(queries)
    first, second = (jnp.asarray(ranks) for ranks in candidate_pairs(top_k))
    num_keys = keys.shape[2]

    def search(halves: Float[Array, "c h 2 half"]) -> tuple[Array, Array]:
        scores, places = _top_k(_score(halves, keys), top_k)
        sums = scores[:, :, 0, first] + scores[:, :, 1, second]
        best, pair = _top_k(sums, top_k)
        rows = jnp.take_along_axis(places[:, :, 0], first[pair], axis=-1)
        columns = jnp.take_along_axis(places[:, :, 1], second[pair], axis=-1)
        return best, rows * num_keys + columns

    return map_chunks(search, halves, chunk=tokens_per_chunk(chunk_bytes, keys))


def search_gradient(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    indices: Int[Array, "t h k"],
    d_scores: Float[Array, "t h k"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, "t h key_dim"], Float[Array, "h 2 n half"]]:
    """Cotangents of queries and keys, through the (sparse) cotangent of the half scores of one chunk at a time."""
    num_heads, _, num_keys, _ = keys.shape
    dtype = accumulator(queries.dtype)
    places = jnp.stack(jnp.divmod(indices, num_keys), axis=2)
    head = jnp.arange(num_heads)[:, None, None]
    half = jnp.arange(2)[:, None]

    def one_chunk(d_keys: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        halves, places, d_scores = chunk
        token = jnp.arange(halves.shape[0])[:, None, None, None]
        d_half = jnp.zeros((halves.shape[0], num_heads, 2, num_keys), dtype)
        d_half = d_half.at[token, head, half, places].add(d_scores[:, :, None, :].astype(dtype))
        d_halves = jnp.einsum("thcn,hcnd->thcd", d_half, keys.astype(dtype), precision="highest")
        d_keys += jnp.einsum("thcn,thcd->hcnd", d_half, halves.astype(dtype), precision="highest")
        return d_keys, d_halves

    chunks = chunked((_split(queries), places, d_scores), tokens_per_chunk(chunk_bytes, keys))
    d_keys, d_halves = jax.lax.scan(one_chunk, vary_like(jnp.zeros(keys.shape, dtype), queries), chunks)
    d_queries = d_halves.reshape(-1, *queries.shape[1:])[: queries.shape[0]]
    return d_queries.astype(queries.dtype), d_keys.astype(keys.dtype)


def _split(queries: Float[Array, "t h key_dim"]) -> Float[Array, "t h 2 half"]:
    return queries.reshape(*queries.shape[:2], 2, queries.shape[2] // 2)


def _score(halves: Float[Array, "c h 2 half"], keys: Float[Array, "h 2 n half"]) -> Float[Array, "c h 2 n"]:
    # "highest" keeps float32 inputs out of TF32, whose 10 bits would swap near ties; bfloat16 products are exact.
    dtype = accumulator(halves.dtype)
    return jnp.einsum("thcd,hcnd->thcn", halves, keys, precision="highest", preferred_element_type=dtype)


def candidate_pairs(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (i, j) in the two sorted halves that can be among the best: (i + 1) (j + 1) pairs are at least as good."""
    ranks = np.arange(1, top_k + 1)
    first, second = np.nonzero(ranks[:, None] * ranks[None, :] <= top_k)
    return first, second


def _top_k(scores: Float[Array, "*b n"], top_k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    # More than two axes would miss the fast kernels.
    best, places = jax.lax.top_k(scores.reshape(-1, scores.shape[-1]), top_k, **_TOP_K_OPTIONS)
    return best.reshape(*scores.shape[:-1], top_k), places.reshape(*scores.shape[:-1], top_k)


def tokens_per_chunk(chunk_bytes: int, keys: Float[Array, "h 2 n half"]) -> int:
    """The number of tokens whose half scores fit into `chunk_bytes`; at least one."""
    num_heads, _, num_keys, _ = keys.shape
    return max(1, chunk_bytes // (8 * num_heads * num_keys))


def chunked(arrays, chunk: int):
    """Splits the leading axis into chunks; the last one is padded with zeros."""
    tokens = jax.tree.leaves(arrays)[0].shape[0]
    chunk = max(1, min(chunk, tokens))
    count = -(-tokens // chunk)

    def split(array: Array) -> Array:
        padding = [(0, count * chunk - tokens)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, chunk, *array.shape[1:])

    return jax.tree.map(split, arrays)


def map_chunks(function, array: Array, *, chunk: int):
    """Maps function over chunks of the leading axis; one chunk, or a symbolic size (`jax.export`), needs no loop."""
    if jax.export.is_symbolic_dim(array.shape[0]) or array.shape[0] <= chunk:
        return function(array)
    results = jax.lax.map(function, chunked(array, chunk))
    return jax.tree.map(lambda result: result.reshape(-1, *result.shape[2:])[: array.shape[0]], results)
