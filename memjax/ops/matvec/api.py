"""The product of a matrix and a single vector, which generation for one text consists of: choice of implementation."""

from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.shapes import require


def matvec(
    x: Float[Array, " k"],
    rows: Float[Array, "n k"],
    residual: Float[Array, " m"] | None = None,
    *,
    gated: bool = False,
    implementation: str | None = None,
) -> Float[Array, " m"]:
    """rows @ x in x's type, summed in float32 or wider; not differentiable in the `triton` implementation.

    Args:
        x: the vector.
        rows: the matrix, [outputs, inputs].
        residual: is added to the result.
        gated: the first half of the product goes through silu and multiplies the second: SwiGLU.
        implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that can run.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    fits = x.ndim == 1 and rows.ndim == 2 and rows.shape[1] == len(x) and not (gated and len(rows) % 2)
    require("matvec", fits, "rows must be [outputs, inputs], an even number of them if gated", x=x, rows=rows)
    if residual is not None:
        fits = residual.shape == (len(rows) // 2 if gated else len(rows),) and residual.dtype == x.dtype
        require("matvec", fits, "residual must be like the result", x=x, rows=rows, residual=residual)
    name = dispatch.choose("matvec", implementation, x.dtype)
    return dispatch.load("matvec", name).matvec(x, rows, residual, gated)
