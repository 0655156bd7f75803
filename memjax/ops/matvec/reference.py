"""The matrix-vector product by its formula."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.ops.precision import accumulator


def matvec(
    x: Float[Array, " k"],
    rows: Float[Array, "n k"],
    residual: Float[Array, " m"] | None,
    bias: Float[Array, " n"] | None,
    input_gate: Float[Array, " k"] | None,
    gated: bool,
) -> Float[Array, " m"]:
    """Every row times x, summed; a gate is cast to x's type before its silu, as a layer's output would be."""
    wide = accumulator(x.dtype)
    if input_gate is not None:
        x = x * jax.nn.silu(input_gate)
    out = jnp.sum(rows.astype(wide) * x.astype(wide)[None, :], axis=1).astype(x.dtype)
    if bias is not None:
        out = out + bias
    if gated:
        gate, up = jnp.split(out, 2)
        out = jax.nn.silu(gate) * up
    return out if residual is None else residual + out
