"""Uses of the grouped product: see `memjax.ops.specs`."""

import jax
import jax.numpy as jnp

from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.specs import Draw, Specs


def specs(draw: Draw) -> Specs:
    """Groups of which one is empty."""
    rows, matrices, sizes = draw.normal(33, 96), draw.normal(3, 96, 40), jnp.asarray([20, 0, 13], jnp.int32)
    product = lambda rows, matrices, name: grouped_matmul(rows, matrices, sizes, implementation=name)
    loss = lambda *arguments: jnp.sum(product(*arguments) ** 2)
    return {
        "product": lambda name: product(rows, matrices, name),
        "gradients": lambda name: jax.grad(loss, argnums=(0, 1))(rows, matrices, name),
    }
