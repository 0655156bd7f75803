from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.ops.row_update.rounding import mix, random_bits, round_stochastically, round_to

MASK = 0xFFFFFFFF


def mix_by_hand(value: int) -> int:
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & MASK
    return value ^ (value >> 16)


def bits(seed, step, rows, columns):
    return random_bits(jnp.uint32(seed), jnp.int32(step), jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32))


compiled_bits = jax.jit(bits)


@given(
    seed=st.integers(0, MASK), step=st.integers(0, 2**31 - 1), row=st.integers(0, 2**30), column=st.integers(0, 8192)
)
def test_bits_are_the_hash_of_seed_step_row_and_column(seed, step, row, column):
    def by_hand(row, column):
        word = mix_by_hand(mix_by_hand(mix_by_hand(mix_by_hand(seed) ^ step) ^ row) ^ (column // 2))
        return word >> 16 if column % 2 else word & 0xFFFF

    expected = [[by_hand(row + i, column + j) for j in range(3)] for i in range(2)]
    got = compiled_bits(np.uint32(seed), np.int32(step), row + np.arange(2), column + np.arange(3))
    np.testing.assert_array_equal(got, np.asarray(expected, np.uint32))


def test_hash_sends_different_numbers_to_different_numbers():
    assert len(np.unique(mix(jnp.arange(1 << 18, dtype=jnp.uint32)))) == 1 << 18


def test_bits_are_even_in_every_position_and_along_every_axis():
    drawn = np.asarray(bits(7, 3, range(256), range(256)))
    assert drawn.max() < 1 << 16
    for position in range(16):
        bit = drawn >> position & 1
        # Six standard errors of the mean of 256 x 256 fair bits, and of the 256 means over rows and over columns.
        assert abs(bit.mean() - 0.5) < 6 * 0.5 / 256
        assert np.abs(bit.mean(axis=0) - 0.5).max() < 6 * 0.5 / 16
        assert np.abs(bit.mean(axis=1) - 0.5).max() < 6 * 0.5 / 16
    for other in (bits(8, 3, range(256), range(256)), bits(7, 4, range(256), range(256))):
        assert np.mean(drawn == np.asarray(other)) < 1e-2


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-5, -271.3, 1.9999])
def test_rounding_is_unbiased_and_takes_only_the_two_neighbours(value):
    value = np.float32(value)
    truncated = (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    away = (truncated.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    share = (float(value) - float(truncated)) / (float(away) - float(truncated))
    rounded = np.asarray(
        round_stochastically(jnp.full((256, 256), value), bits(1, 2, range(256), range(256))), np.float32
    )
    assert set(np.unique(rounded)) == {truncated, away}
    assert abs(np.mean(rounded == away) - share) < 6 * (share * (1 - share)) ** 0.5 / 256


@given(seed=st.integers(0, MASK), step=st.integers(0, 1000))
def test_values_that_bfloat16_can_represent_are_kept(seed, step):
    special = jnp.asarray([[0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan]], jnp.float32)
    rounded = round_stochastically(special, compiled_bits(np.uint32(seed), np.int32(step), np.arange(1), np.arange(7)))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), special)


def test_only_bfloat16_is_rounded_at_random_and_only_on_demand():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)

    @partial(jax.jit, static_argnums=(0, 1))
    def run(dtype, stochastic, step=0):
        return round_to(values, dtype, stochastic, jnp.uint32(5), jnp.asarray(step), jnp.arange(16), jnp.arange(16))

    np.testing.assert_array_equal(run(jnp.float32, True), values)
    nearest = values.astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(jnp.bfloat16, False), nearest)
    np.testing.assert_array_equal(run(jnp.bfloat16, True), run(jnp.bfloat16, True))
    assert np.any(run(jnp.bfloat16, True) != nearest)
    assert np.any(run(jnp.bfloat16, True) != run(jnp.bfloat16, True, step=1))


def test_steps_below_half_a_unit_in_the_last_place_are_not_lost_on_average():
    rows = jnp.ones((64, 64), jnp.bfloat16)

    def one(step, rows):
        return round_to(
            rows.astype(jnp.float32) + 2.0**-10, jnp.bfloat16, True, jnp.uint32(0), step, jnp.arange(64), jnp.arange(64)
        )

    # 128 steps of 2**-10; the spacing of bfloat16 above 1 is 2**-7, so rounding to the nearest would stay at 1.
    mean = np.asarray(jax.lax.fori_loop(0, 128, one, rows), np.float64).mean()
    assert abs(mean - 1.125) < 6 * 2.0**-7 * (128 / 8) ** 0.5 / 64
