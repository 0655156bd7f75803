import jax
import jax.numpy as jnp
import pytest

from memjax.memory import parallel
from memjax.models.remat import rematerialised

TOKENS, WIDTH, HIDDEN = 16, 24, 40


def kept(remat, mesh):
    """Shapes of what the backward pass of a small block is given."""

    def block(weights, x):
        first, second, last = parallel.whole(weights)
        return (jax.nn.silu(x @ first) * (x @ second)) @ last

    shape = jax.ShapeDtypeStruct
    weights = [shape(size, jnp.float32) for size in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))]

    def backward(weights, x):
        return jax.vjp(rematerialised(remat)(block), weights, x)[1]

    with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(jax.eval_shape(backward, weights, shape((TOKENS, WIDTH), jnp.float32)))
    return [leaf.shape for leaf in leaves]


def test_on_several_devices_products_are_kept_and_cheap_values_made_again(mesh):
    shapes = kept("none", mesh)
    # Both products of the hidden width; neither the sigmoid nor what it is multiplied with.
    assert shapes.count((TOKENS, HIDDEN)) == 2
    assert shapes.count((TOKENS, WIDTH)) == 1
    # The weights as they lie on the devices, not whole as well.
    assert shapes.count((WIDTH, HIDDEN)) == 2


@pytest.mark.parametrize(("remat", "products"), [("dots", 2), ("block", 0)])
def test_policies_keep_what_they_name(remat, products, mesh):
    assert kept(remat, mesh).count((TOKENS, HIDDEN)) == products
