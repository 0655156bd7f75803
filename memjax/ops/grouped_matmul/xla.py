"""The grouped matmul as XLA's ragged dot.

On backends without a kernel for it, such as CPUs, XLA multiplies every row by every matrix and keeps one product of
each row: g times the work.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.precision import accumulator

_ROWS_OF_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_matmul(
    rows: Float[Array, "m k"], matrices: Float[Array, "g ..."], sizes: Int[Array, " g"], *, transposed: bool = False
) -> Float[Array, "m n"]:
    """The reference's products, summed in float32 or wider."""
    matrices = jnp.swapaxes(matrices, 1, 2) if transposed else matrices
    wide = accumulator(rows.dtype)
    return jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=wide).astype(rows.dtype)


def matrices_gradient(
    rows: Float[Array, "m k"], cotangent: Float[Array, "m n"], sizes: Int[Array, " g"]
) -> Float[Array, "g k n"]:
    """The reference's sums, in float32 or wider."""
    wide = accumulator(rows.dtype)
    found = jax.lax.ragged_dot_general(rows, cotangent, sizes, _ROWS_OF_GROUPS, preferred_element_type=wide)
    return found.astype(rows.dtype)
