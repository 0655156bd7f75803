import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memjax.models.rotary import rotate

rotated = jax.jit(rotate, static_argnums=2)


def by_hand(x, positions, theta):
    """Every pair (x[i], x[i + h/2]) as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        for i in range(half):
            angle = positions[place[:2]] * theta ** (-2 * i / x.shape[-1])
            turned = complex(x[(*place, i)], x[(*place, i + half)]) * np.exp(1j * angle)
            out[(*place, i)], out[(*place, i + half)] = turned.real, turned.imag
    return out


@given(seed=st.integers(0, 2**32 - 1), theta=st.sampled_from([10.0, 10_000.0]))
def test_pairs_are_turned_by_their_angle(seed, theta):
    rng = np.random.default_rng(seed)
    x, positions = rng.normal(size=(2, 3, 2, 6)), rng.integers(0, 5000, size=(2, 3)).astype(np.int32)
    with jax.enable_x64(True):
        np.testing.assert_allclose(rotated(x, positions, theta), by_hand(x, positions, theta), atol=1e-11)


def test_inner_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(1, 1, 1, 8)), rng.normal(size=(1, 1, 1, 8))
    with jax.enable_x64(True):

        def at(x, place):
            return np.asarray(rotated(x, np.full((1, 1), place, np.int32), 100.0)).ravel()

        products = [at(query, 7 + shift) @ at(key, 3 + shift) for shift in (0, 11, 500)]
    np.testing.assert_allclose(products, products[0], rtol=1e-12)


def test_bfloat16_angles_are_exact_at_far_positions():
    x = np.ones((1, 1, 1, 4), np.float32)
    far = np.full((1, 1), 40_001, np.int32)
    got = rotated(jnp.asarray(x, jnp.bfloat16), far, 10_000.0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), by_hand(x, far, 10_000.0), atol=0.02)
