"""The definition of the grouped matmul, and of the gradient of its matrices."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator


def grouped_matmul(
    rows: Float[Array, "m k"], matrices: Float[Array, "g ..."], sizes: Int[Array, " g"], *, transposed: bool = False
) -> Float[Array, "m n"]:
    """Every row times the matrix of its group, or times that matrix transposed."""
    matrices = jnp.swapaxes(matrices, 1, 2) if transposed else matrices
    wide = accumulator(rows.dtype)
    every = jnp.einsum("mk,gkn->gmn", rows.astype(wide), matrices.astype(wide), precision="highest")
    # Not multiplied by 0: the product of a row with another group's matrix may be infinite.
    return jnp.sum(jnp.where(_members(sizes, rows.shape[0]), every, 0), axis=0).astype(rows.dtype)


def matrices_gradient(
    rows: Float[Array, "m k"], cotangent: Float[Array, "m n"], sizes: Int[Array, " g"]
) -> Float[Array, "g k n"]:
    """For each group, the sum over its rows of the outer product of row and cotangent."""
    wide = accumulator(rows.dtype)
    own = jnp.where(_members(sizes, rows.shape[0]), rows.astype(wide)[None], 0)
    theirs = jnp.where(_members(sizes, rows.shape[0]), cotangent.astype(wide)[None], 0)
    found = jnp.einsum("gmk,gmn->gkn", own, theirs, precision="highest")
    return found.astype(rows.dtype)


def _members(sizes: Int[Array, " g"], num_rows: int):
    """[g, m, 1]: whether a row belongs to a group."""
    sizes = sizes.astype(jnp.int32)[:, None, None]
    ends = jnp.cumsum(sizes, axis=0, dtype=jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)[None, :, None]
    return (row >= ends - sizes) & (row < ends)
