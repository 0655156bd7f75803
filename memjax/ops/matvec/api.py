"""Public API of the matrix-vector product, the main work of decoding a single text."""

from jaxtyping import Array, Float

from memjax.ops import dispatch
from memjax.ops.shapes import require


def matvec(
    x: Float[Array, " k"],
    rows: Float[Array, "n k"],
    residual: Float[Array, " m"] | None = None,
    *,
    bias: Float[Array, " n"] | None = None,
    input_gate: Float[Array, " k"] | None = None,
    gated: bool = False,
    implementation: str | None = None,
) -> Float[Array, " m"]:
    """rows @ x + bias in x's type, summed in float32 or wider; not differentiable in the `triton` implementation.

    Args:
        x: the vector.
        rows: the matrix, [outputs, inputs].
        residual: added to the result.
        bias: added to the product.
        input_gate: x is multiplied by its silu first.
        gated: the silu of the first half of the product multiplies the second half (SwiGLU).
        implementation: one of `dispatch.IMPLEMENTATIONS`; None takes the fastest that can run.

    Raises:
        ValueError: shapes do not fit together, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run here.
    """
    fits = x.ndim == 1 and rows.ndim == 2 and rows.shape[1] == len(x) and not (gated and len(rows) % 2)
    require("matvec", fits, "rows must be [outputs, inputs], an even number of them if gated", x=x, rows=rows)
    lengths = {"residual": len(rows) // 2 if gated else len(rows), "bias": len(rows), "input_gate": len(x)}
    for name, array in {"residual": residual, "bias": bias, "input_gate": input_gate}.items():
        if array is not None:
            fits = array.shape == (lengths[name],) and array.dtype == x.dtype
            rule = f"{name} must have {lengths[name]} numbers of x's type"
            require("matvec", fits, rule, x=x, rows=rows, **{name: array})
    name = dispatch.choose("matvec", implementation, x.dtype)
    return dispatch.load("matvec", name).matvec(x, rows, residual, bias, input_gate, gated)
