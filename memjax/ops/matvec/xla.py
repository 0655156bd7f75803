"""The product of a matrix and a vector for XLA, which makes a reduction of it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matvec(
    x: Float[Array, " k"], rows: Float[Array, "n k"], residual: Float[Array, " m"] | None, gated: bool
) -> Float[Array, " m"]:
    """The product, then the gate and the sum."""
    out = jnp.matmul(rows, x)
    if gated:
        gate, up = jnp.split(out, 2)
        out = jax.nn.silu(gate) * up
    return out if residual is None else residual + out
