"""Uses of the search: see `memjax.ops.specs`."""

import jax
import jax.numpy as jnp

from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.specs import Draw, Specs


def specs(draw: Draw) -> Specs:
    """A search, without its indices: which of two equal scores comes first is not promised."""
    queries, keys = draw.normal(5, 2, 32), draw.normal(2, 2, 40, 16)
    scores = lambda queries, keys, name: product_key_search(queries, keys, 5, implementation=name)[0]
    loss = lambda *arguments: jnp.sum(scores(*arguments) ** 2)
    return {
        "scores": lambda name: scores(queries, keys, name),
        "gradients": lambda name: jax.grad(loss, argnums=(0, 1))(queries, keys, name),
    }
