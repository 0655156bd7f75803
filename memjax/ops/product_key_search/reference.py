"""The definition of the product-key search."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


def product_key_search(
    queries: Float[Array, "t h key_dim"], keys: Float[Array, "h 2 n half"], top_k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    """The top_k slots of all n * n, where slot i * n + j scores <q1, keys1[i]> + <q2, keys2[j]> (arXiv:1907.05242)."""
    num_keys = keys.shape[2]
    left, right = half_scores(queries, keys)
    pairs = left[..., :, None] + right[..., None, :]
    scores, slots = jax.lax.top_k(pairs.reshape(*pairs.shape[:2], num_keys**2), top_k)
    return scores, slots


def search_gradient(
    queries: Float[Array, "t h key_dim"],
    keys: Float[Array, "h 2 n half"],
    indices: Int[Array, "t h k"],
    d_scores: Float[Array, "t h k"],
) -> tuple[Float[Array, "t h key_dim"], Float[Array, "h 2 n half"]]:
    """Cotangents of queries and keys: the picks are constants, their scores are linear in both."""

    def scores_of_picks(queries: Array, keys: Array) -> Array:
        left, right = half_scores(queries, keys)
        first, second = jnp.divmod(indices, keys.shape[2])
        return jnp.take_along_axis(left, first, axis=-1) + jnp.take_along_axis(right, second, axis=-1)

    return jax.vjp(scores_of_picks, queries, keys)[1](d_scores)


def half_scores(
    queries: Float[Array, "t h key_dim"], keys: Float[Array, "h 2 n half"]
) -> tuple[Float[Array, "t h n"], Float[Array, "t h n"]]:
    """Scores of every sub-key of the first and of the second half."""
    dtype = accumulator(queries.dtype)
    halves = queries.reshape(*queries.shape[:2], 2, -1).astype(dtype)
    scores = jnp.einsum("thcd,hcnd->thcn", halves, keys.astype(dtype), precision="highest")
    return scores[:, :, 0], scores[:, :, 1]
