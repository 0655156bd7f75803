"""The embedding dot as others call it: any batch shape, gradients, choice of the implementation."""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.row_gradient import RowGradient

SAVED_NAME = "memory_dot"
"""`checkpoint_name` of the output, so that rematerialisation can keep it."""


def embedding_dot(
    table: Float[Array, "n d"],
    indices: Int[Array, "*t k"],
    vectors: Float[Array, "*t d"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*t k"]:
    """out[t, k] = <vectors[t], table[indices[t, k]]>, in float32 or wider: the transpose of the embedding bag.

    Differentiable in `table` (see `embedding_bag` for its price) and `vectors`. Indices outside 0..n-1 are not checked.

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    name = dispatch.choose("embedding_dot", implementation, table.dtype)
    batch, picks = indices.shape[:-1], indices.shape[-1]
    out: Any = _dot(name, table, indices.reshape(-1, picks), vectors.reshape(-1, vectors.shape[-1]))
    return out.reshape(*batch, picks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(name: str, table: Array, indices: Array, vectors: Array) -> Array:
    return dispatch.load("embedding_dot", name).embedding_dot(table, indices, vectors)


def _dot_forward(name, table, indices, vectors):
    out = _dot(name, table.value, indices.value, vectors.value)
    wanted = ("table",) if table.perturbed else ()
    residuals = (table.value, indices.value, vectors.value, dict.fromkeys(wanted))
    return checkpoint_name(out, SAVED_NAME), residuals


def _dot_backward(name, residuals, cotangent):
    table, indices, vectors, wanted = residuals
    d_vectors = dispatch.load("embedding_bag", name).embedding_bag(table, indices, cotangent)
    d_table = None
    if "table" in wanted:
        d_table = RowGradient(indices, cotangent, vectors).dense(table.shape[0]).astype(table.dtype)
    return d_table, None, d_vectors.astype(vectors.dtype)


_dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)
