"""The matrix-vector product in plain XLA, which turns it into a reduction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matvec(
    x: Float[Array, " k"],
    rows: Float[Array, "n k"],
    residual: Float[Array, " m"] | None,
    bias: Float[Array, " n"] | None,
    input_gate: Float[Array, " k"] | None,
    gated: bool,
) -> Float[Array, " m"]:
    """The reference's formula, summed as XLA chooses."""
    if input_gate is not None:
        x = x * jax.nn.silu(input_gate)
    out = jnp.matmul(rows, x)
    if bias is not None:
        out = out + bias
    if gated:
        gate, up = jnp.split(out, 2)
        out = jax.nn.silu(gate) * up
    return out if residual is None else residual + out
