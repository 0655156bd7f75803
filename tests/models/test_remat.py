import jax
import jax.numpy as jnp
import pytest

from memjax.models.remat import rematerialised
from memjax.sharding.axes import gathered

TOKENS, WIDTH, HIDDEN = 16, 24, 40


def kept(remat, mesh):
    """The shapes that a small block saves for its backward pass."""

    def block(weights, x):
        first, second, last = gathered(weights)
        return (jax.nn.silu(x @ first) * (x @ second)) @ last

    shape = jax.ShapeDtypeStruct
    weights = [shape(size, jnp.float32) for size in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))]

    def backward(weights, x):
        return jax.vjp(rematerialised(remat)(block), weights, x)[1]

    with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(jax.eval_shape(backward, weights, shape((TOKENS, WIDTH), jnp.float32)))
    return [leaf.shape for leaf in leaves]


def test_without_remat_nothing_is_recomputed_on_several_devices(mesh):
    with jax.set_mesh(mesh):
        assert rematerialised("none")(kept) is kept


@pytest.mark.parametrize(("remat", "products"), [("dots", 2), ("block", 0)])
def test_policies_save_what_they_name(remat, products, mesh):
    shapes = kept(remat, mesh)
    assert shapes.count((TOKENS, HIDDEN)) == products
    # Weights are saved once, and not in gathered form as well.
    assert shapes.count((WIDTH, HIDDEN)) == 2
