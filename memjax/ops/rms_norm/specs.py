"""Uses of the norm: see `memjax.ops.specs`."""

import jax
import jax.numpy as jnp

from memjax.ops.rms_norm.api import rms_norm
from memjax.ops.specs import Draw, Specs


def specs(draw: Draw) -> Specs:
    """A norm, and its gradients together with the residual's."""
    x, scale = draw.normal(33, 96), 1 + draw.normal(96)

    def loss(x: jax.Array, scale: jax.Array, name: str) -> jax.Array:
        found = rms_norm(x, scale, 1e-5, implementation=name)
        return jnp.sum(found.normed**2) + jnp.sum(found.x**3)

    return {
        "norm": lambda name: rms_norm(x, scale, 1e-5, implementation=name),
        "gradients": lambda name: jax.grad(loss, argnums=(0, 1))(x, scale, name),
    }
