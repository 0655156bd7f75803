import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.config.model import RopeScalingConfig
from memjax.models.rotary import rotate

rotated = jax.jit(rotate, static_argnums=(2, 3))


def stretched(frequency, scaling):
    """Llama 3.1's rule, by the wavelength in tokens."""
    length = 2 * np.pi / frequency
    if length < scaling.original_length / scaling.high_freq_factor:
        return frequency
    if length > scaling.original_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_length / length - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def by_hand(x, positions, theta, scaling=None):
    """Rotates every pair (x[i], x[i + h/2]) as a complex number by its angle."""
    half = x.shape[-1] // 2
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        for i in range(half):
            frequency = theta ** (-2 * i / x.shape[-1])
            angle = positions[place[:2]] * (frequency if scaling is None else stretched(frequency, scaling))
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


def test_slow_frequencies_are_stretched_and_fast_ones_stay():
    scaling = RopeScalingConfig(factor=8.0, original_length=128)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(1, 4, 2, 16)), rng.integers(0, 1000, size=(1, 4)).astype(np.int32)
    frequencies = 1000.0 ** (-np.arange(8) / 8)
    ratios = np.array([stretched(frequency, scaling) for frequency in frequencies]) / frequencies
    # All three cases occur.
    assert ratios[0] == 1
    assert ratios[-1] == 1 / 8
    assert any(1 / 8 < ratio < 1 for ratio in ratios)
    with jax.enable_x64(True):
        got = rotated(x, positions, 1000.0, scaling)
        np.testing.assert_allclose(got, by_hand(x, positions, 1000.0, scaling), atol=1e-11)


def _frequency(scaling: RopeScalingConfig, number: int, width: int, theta: float, length: int) -> float:
    """A pair's angle between neighbouring positions, by the papers' formulas."""
    plain = theta ** (-2 * number / width)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "dynamic":
        stretch = scaling.factor * max(length, scaling.original_length) / scaling.original_length - scaling.factor + 1
        return (theta * stretch ** (width / (width - 2))) ** (-2 * number / width)
    if scaling.kind == "longrope":
        return plain / (scaling.long_factor if length > scaling.original_length else scaling.short_factor)[number]
    # yarn: the (fractional) index of the pair that makes so many turns within the original length; rounded outwards.
    pair = lambda turns: width * np.log(scaling.original_length / (turns * 2 * np.pi)) / (2 * np.log(theta))
    low, high = max(np.floor(pair(scaling.beta_fast)), 0), min(np.ceil(pair(scaling.beta_slow)), width - 1)
    share = min(max((number - low) / (high - low), 0), 1)
    return plain / scaling.factor * share + plain * (1 - share)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (RopeScalingConfig(kind="linear", factor=4.0), 1.0),
        (RopeScalingConfig(kind="dynamic", factor=4.0, original_length=64), 1.0),
        (RopeScalingConfig(kind="yarn", factor=4.0, original_length=64), 0.1 * np.log(4) + 1),
        (
            RopeScalingConfig(kind="yarn", factor=4.0, original_length=64, mscale=0.5, mscale_all_dim=0.25),
            (0.05 * np.log(4) + 1) / (0.025 * np.log(4) + 1),
        ),
        (RopeScalingConfig(kind="yarn", factor=4.0, original_length=64, attention_factor=1.5), 1.5),
        (
            RopeScalingConfig(
                kind="longrope",
                factor=4.0,
                original_length=64,
                short_factor=(1.0, 1.5, 2.0, 2.5),
                long_factor=(2.0, 3.0, 4.0, 5.0),
            ),
            np.sqrt(1 + np.log(4) / np.log(64)),
        ),
    ],
    ids=["linear", "dynamic", "yarn", "yarn mscale", "yarn factor", "longrope"],
)
def test_scaled_frequencies_are_those_of_the_papers(scaling, factor):
    rng = np.random.default_rng(0)
    # One row within the original length, one beyond it.
    positions = np.stack([np.arange(20), np.arange(20) * 7]).astype(np.int32)
    x, theta = rng.normal(size=(2, 20, 1, 8)), 1000.0
    expected = np.zeros(x.shape)
    for row, place, pair in np.ndindex(2, 20, 4):
        length = positions[row].max() + 1
        angle = positions[row, place] * _frequency(scaling, pair, 8, theta, length)
        turned = complex(x[row, place, 0, pair], x[row, place, 0, pair + 4]) * np.exp(1j * angle) * factor
        expected[row, place, 0, pair], expected[row, place, 0, pair + 4] = turned.real, turned.imag
    with jax.enable_x64(True):
        np.testing.assert_allclose(rotated(x, positions, theta, scaling), expected, atol=1e-11)
