"""The product-key search as others call it: any batch shape, gradients, choice of the implementation."""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch

SAVED_SCORES, SAVED_INDICES = "memory_scores", "memory_indices"
"""`checkpoint_name`s of the outputs: with both kept, rematerialisation does not search again."""


def product_key_search(
    queries: Float[Array, "*t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*t h k"], Int[Array, "*t h k"]]:
    """The top_k best of n * n slots per token and head, exactly: scores (best first, float32 or wider) and int32 slots.

    A slot i * n + j scores <first half of the query, keys[h, 0, i]> + <second half, keys[h, 1, j]>. The slots of a
    token and head are distinct, also when scores are equal; which of equal scores come first is not specified.
    Differentiable in `queries` and `keys`. NaN in gives NaN out.

    Raises:
        ValueError: sizes do not fit, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    num_heads, _, num_keys, half_dim = keys.shape
    if not 1 <= top_k <= num_keys:
        raise ValueError(f"top_k={top_k} must be in 1..n={num_keys}: each half offers only n candidates")
    if queries.shape[-2:] != (num_heads, 2 * half_dim):
        raise ValueError(
            f"queries end in [heads, key_dim] = {queries.shape[-2:]}, but the keys {keys.shape} need "
            f"{(num_heads, 2 * half_dim)}"
        )
    name = dispatch.choose("product_key_search", implementation, keys.dtype)
    batch = queries.shape[:-2]
    found: Any = _search(name, top_k, queries.reshape(-1, *queries.shape[-2:]), keys)
    scores, indices = found
    return scores.reshape(*batch, num_heads, top_k), indices.reshape(*batch, num_heads, top_k)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _search(name: str, top_k: int, queries: Array, keys: Array) -> tuple[Array, Array]:
    return dispatch.load("product_key_search", name).product_key_search(queries, keys, top_k)


def _search_forward(name, top_k, queries, keys):
    found: Any = _search(name, top_k, queries, keys)
    scores, indices = found
    scores, indices = checkpoint_name(scores, SAVED_SCORES), checkpoint_name(indices, SAVED_INDICES)
    return (scores, indices), (queries, keys, indices)


def _search_backward(name, top_k, residuals, cotangents):
    queries, keys, indices = residuals
    d_scores, _ = cotangents
    return dispatch.load("product_key_search", name).search_gradient(queries, keys, indices, d_scores)


_search.defvjp(_search_forward, _search_backward)
