"""Public API of the product-key search: batch shapes, gradients, dispatch."""

import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.precision import accumulator
from memjax.ops.shapes import require

SAVED_SCORES, SAVED_INDICES = "memory_scores", "memory_indices"
"""`checkpoint_name`s of the outputs: if both are kept, rematerialisation does not search again."""

MOST_SLOTS = 2**31 - 1


def product_key_search(
    queries: Float[Array, "*t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    implementation: str | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, "*t h k"], Int[Array, "*t h k"]]:
    """The top_k best of n * n slots per token and head, exactly: scores (best first, float32 or wider) and int32 slots.

    A slot i * n + j scores <first half of the query, keys[h, 0, i]> + <second half, keys[h, 1, j]>. The slots of a
    token and head are distinct, even if scores are equal; the order of equal scores is not specified.
    Differentiable in `queries` and `keys`. NaN in gives NaN out.

    Args:
        queries: one for each token and head.
        keys: two halves of n for each head.
        top_k: slots to find.
        implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that can run.
        chunk_bytes: half scores held at once; None leaves it to the implementation (the reference holds them all).

    Raises:
        ValueError: shapes do not fit together, there are more slots than 32 bits can number, or `implementation` is
            unknown.
        TypeError: top_k is not an integer.
        NotImplementedError: `implementation` cannot run here.
    """
    fits = keys.ndim == 4 and keys.shape[1] == 2 and queries.shape[-2:] == (keys.shape[0], 2 * keys.shape[3])
    rule = "queries must be [..., heads, key_dim] and keys [heads, 2, n, key_dim / 2]"
    require("product_key_search", fits, rule, queries=queries, keys=keys)
    num_heads, _, num_keys, _ = keys.shape
    if num_keys**2 > MOST_SLOTS:
        raise ValueError(
            f"n={num_keys} keys make {num_keys**2:,} slots; slot numbers are 32-bit, at most {MOST_SLOTS:,}"
        )
    top_k = operator.index(top_k)
    if not 1 <= top_k <= num_keys:
        raise ValueError(f"top_k={top_k} must be in 1..n={num_keys}: each half offers only n candidates")
    name = dispatch.choose("product_key_search", implementation, keys.dtype)
    batch = queries.shape[:-2]
    if queries.size == 0:
        shape = (*batch, num_heads, top_k)
        return jnp.zeros(shape, accumulator(queries.dtype)), jnp.zeros(shape, jnp.int32)
    folded = queries.reshape(math.prod(batch), *queries.shape[-2:])
    found: Any = _search(name, top_k, chunk_bytes, *vary_together((folded, keys)))
    scores, indices = found
    return scores.reshape(*batch, num_heads, top_k), indices.reshape(*batch, num_heads, top_k)


def weighted_search(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The slots of `product_key_search`, with the softmax of their scores times `scale`. For inference: no gradient."""
    name = dispatch.choose("product_key_search", implementation, keys.dtype)
    if name == "triton" and queries.size:
        return dispatch.load("product_key_search", name).weighted_search(queries, keys, top_k, scale)
    scores, slots = product_key_search(queries, keys, top_k, implementation=name)
    return jax.nn.softmax(scale * scores, axis=-1), slots


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _search(name: str, top_k: int, chunk_bytes: int | None, queries: Array, keys: Array) -> tuple[Array, Array]:
    module = dispatch.load("product_key_search", name)
    return module.product_key_search(queries, keys, top_k, **_options(name, chunk_bytes))


def _search_forward(name, top_k, chunk_bytes, queries, keys):
    found: Any = _search(name, top_k, chunk_bytes, queries, keys)
    scores, indices = found
    scores, indices = checkpoint_name(scores, SAVED_SCORES), checkpoint_name(indices, SAVED_INDICES)
    return (scores, indices), (queries, keys, indices)


def _search_backward(name, top_k, chunk_bytes, residuals, cotangents):
    queries, keys, indices = residuals
    d_scores, _ = cotangents
    module = dispatch.load("product_key_search", name)
    return module.search_gradient(queries, keys, indices, d_scores, **_options(name, chunk_bytes))


def _options(name: str, chunk_bytes: int | None) -> dict[str, int]:
    return {} if chunk_bytes is None or name == "reference" else {"chunk_bytes": chunk_bytes}


_search.defvjp(_search_forward, _search_backward)
