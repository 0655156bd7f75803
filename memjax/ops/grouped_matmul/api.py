"""Public API of the grouped matmul: gradients, dispatch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops import dispatch
from memjax.ops.manual_axes import vary_together
from memjax.ops.shapes import require


def grouped_matmul(
    rows: Float[Array, "m k"],
    matrices: Float[Array, "g inputs n"],
    sizes: Int[Array, " groups"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m n"]:
    """Every row times the matrix of its group, summed in float32 or wider, in the rows' type.

    Rows are in the order of their groups: the first sizes[0] belong to group 0, and so on. Groups may be empty. The
    sizes must add up to m; this is not checked, and results for rows beyond their sum are undefined.
    Differentiable in `rows` and `matrices`, which must be of the same type.

    Raises:
        ValueError: shapes or types do not fit, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    fits = (rows.ndim, matrices.ndim, rows.dtype) == (2, 3, matrices.dtype) and sizes.shape == matrices.shape[:1]
    rule = "rows must be [m, k], matrices [groups, k, n] of the same type, and sizes [groups]"
    fits = fits and rows.shape[1] == matrices.shape[1]
    require("grouped_matmul", fits, rule, rows=rows, matrices=matrices, sizes=sizes)
    name = dispatch.choose("grouped_matmul", implementation, matrices.dtype)
    if rows.size == 0:
        return jnp.zeros((rows.shape[0], matrices.shape[2]), rows.dtype)
    out: Any = _product(name, *vary_together((rows, matrices, sizes)))
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, rows: Array, matrices: Array, sizes: Array) -> Array:
    return dispatch.load("grouped_matmul", name).grouped_matmul(rows, matrices, sizes)


def _product_forward(name, rows, matrices, sizes):
    return _product(name, rows, matrices, sizes), (rows, matrices, sizes)


def _product_backward(name, residuals, cotangent):
    rows, matrices, sizes = residuals
    module = dispatch.load("grouped_matmul", name)
    d_rows = module.grouped_matmul(cotangent, matrices, sizes, transposed=True)
    return d_rows, module.matrices_gradient(rows, cotangent, sizes), None


_product.defvjp(_product_forward, _product_backward)
