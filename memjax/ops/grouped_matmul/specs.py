"""Cases of the grouped matmul: see `memjax.ops.specs`."""

import jax.numpy as jnp

from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.specs import Case, Draw, Specs


def specs(draw: Draw) -> Specs:
    """Three groups, one of them empty."""
    sizes = jnp.asarray([20, 0, 13], jnp.int32)
    product = lambda name, rows, matrices: grouped_matmul(rows, matrices, sizes, implementation=name)
    return {"product": Case(product, (draw.normal(33, 96), draw.normal(3, 96, 40)))}
