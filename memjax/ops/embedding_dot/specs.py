"""Uses of the dot: see `memjax.ops.specs`."""

import jax
import jax.numpy as jnp

from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.specs import Draw, Specs


def specs(draw: Draw) -> Specs:
    """A dot with rows of a table, and the gradients of both vectors and table."""
    table, indices, vectors = draw.normal(500, 96), draw.integers(500, 33, 7), draw.normal(33, 96)
    loss = lambda table, vectors, name: jnp.sum(embedding_dot(table, indices, vectors, implementation=name) ** 2)
    return {
        "dot": lambda name: embedding_dot(table, indices, vectors, implementation=name),
        "gradients": lambda name: jax.grad(loss, argnums=(0, 1))(table, vectors, name),
    }
