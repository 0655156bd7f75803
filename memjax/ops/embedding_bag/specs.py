"""Uses of the bag: see `memjax.ops.specs`."""

import jax
import jax.numpy as jnp

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.specs import Draw, Specs


def specs(draw: Draw) -> Specs:
    """A bag of a table, and the gradients of both weights and table."""
    table, indices, weights = draw.normal(500, 96), draw.integers(500, 33, 7), draw.normal(33, 7)
    loss = lambda table, weights, name: jnp.sum(embedding_bag(table, indices, weights, implementation=name) ** 2)
    return {
        "bag": lambda name: embedding_bag(table, indices, weights, implementation=name),
        "gradients": lambda name: jax.grad(loss, argnums=(0, 1))(table, weights, name),
    }
