"""Decode attention is softmax attention over the visible keys, whatever the cache holds beyond them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.decode_attention.api import decode_step

every_implementation = pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
# Rows, query heads, key heads, head width, cache length; groups and widths that do not fill a tile.
SHAPES = [(3, 4, 2, 8, 96), (2, 3, 3, 24, 40), (1, 5, 1, 16, 7)]


def draw(shape, dtype="float32"):
    """New tokens at various positions, and a cache with large numbers beyond these."""
    (rows, heads, kv_heads, width, size), rng = shape, np.random.default_rng(sum(shape))
    # The last position, the first, and one in the middle.
    positions = np.array([size - 1, 0, (size - 1) // 2][:rows], np.int32)
    joined = rng.normal(size=(rows, (heads + 2 * kv_heads) * width))
    keys, values = rng.normal(size=(2, rows, kv_heads, size, width))
    for row, place in enumerate(positions):
        keys[row, :, place:] = values[row, :, place:] = 1e4
    joined, keys, values = (jnp.asarray(array, dtype) for array in (joined, keys, values))
    return joined, keys, values, jnp.asarray(positions)


def by_hand(query, keys, values, lengths, window):
    query, keys, values = (np.asarray(array, np.float64) for array in (query, keys, values))
    out = np.zeros(query.shape)
    for row, head in np.ndindex(query.shape[:2]):
        own, end = head // (query.shape[1] // keys.shape[1]), int(lengths[row])
        seen = range(max(0, end - window) if window else 0, end)
        weights = np.exp([query[row, head] @ keys[row, own, place] / query.shape[2] ** 0.5 for place in seen])
        total = sum(weight * values[row, own, place] for weight, place in zip(weights, seen, strict=True))
        out[row, head] = total / weights.sum()
    return out


@every_implementation
def test_positions_may_be_unsigned_or_narrow(implementation):
    joined, keys, values, _ = draw((2, 2, 1, 8, 300))
    step = partial(decode_step, joined, keys, values, rotation=None, implementation=implementation)
    for kind, places in (("int8", [3, 100]), ("uint8", [3, 255])):
        expected, found = (step(jnp.array(places, kind)) for kind in ("int32", kind))
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


@cache
def compiled_step(implementation, window):
    return jax.jit(partial(decode_step, window=window, implementation=implementation))


def turned(x, angles):
    """Rotates the pairs (x[i], x[i + h/2]) of heads [n, h] as complex numbers."""
    half = x.shape[1] // 2
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def stepped(joined, keys, values, positions, window, angles=None):
    """The attention and the updated cache, in float64 NumPy."""
    joined, keys, values = (np.array(array, np.float64) for array in (joined, keys, values))
    (_, kv_heads, size, width), query = keys.shape, []
    for row, place in enumerate(positions):
        parts = joined[row].reshape(-1, width)
        heads = len(parts) - 2 * kv_heads
        if angles is not None:
            parts[: heads + kv_heads] = turned(parts[: heads + kv_heads], angles[row])
        query.append(parts[:heads])
        if place < size:
            keys[row, :, place], values[row, :, place] = parts[heads : heads + kv_heads], parts[heads + kv_heads :]
    return by_hand(np.stack(query), keys, values, np.minimum(positions + 1, size), window), keys, values


@every_implementation
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_attends_to_filled_positions_in_its_window(implementation, window, shape):
    arguments = draw(shape)
    out, *_ = compiled_step(implementation, window)(*arguments, None)
    np.testing.assert_allclose(out, stepped(*arguments, window)[0], rtol=2e-5, atol=2e-5)


@every_implementation
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("shape", "has_angles"), [(SHAPES[0], True), (SHAPES[1], True), (SHAPES[2], False)])
def test_a_step_writes_the_new_entry_and_sees_it(implementation, window, shape, has_angles):
    (rows, heads, kv_heads, width, size), rng = shape, np.random.default_rng(3)
    # A position in the middle, the first one, and one beyond the cache.
    positions = np.array([size // 2, 0, size][:rows], np.int32)
    joined = rng.normal(size=(rows, (heads + 2 * kv_heads) * width))
    keys, values = rng.normal(size=(2, rows, kv_heads, size, width))
    angles = rng.uniform(0, 6, size=(rows, width // 2)) if has_angles else None
    rotation = None if angles is None else (jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles)))
    arrays = (jnp.float32(array) for array in (joined, keys, values))
    out, *written = compiled_step(implementation, window)(*arrays, jnp.asarray(positions), rotation)
    expected, *cache = stepped(joined, keys, values, positions, window, angles)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    for found, array in zip(written, cache, strict=True):
        np.testing.assert_allclose(found, array, rtol=2e-6, atol=2e-6)


# Triton's interpreter cannot multiply bfloat16.
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("triton", "float16"), ("xla", "float16"), ("xla", "bfloat16"), ("reference", "bfloat16")],
)
def test_sixteen_bits_are_summed_in_float32(implementation, dtype):
    arguments = draw(SHAPES[0], dtype)
    out, *_ = compiled_step(implementation, None)(*arguments, None)
    assert out.dtype == dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), stepped(*arguments, None)[0], rtol=tolerance, atol=tolerance
    )


def test_arrays_that_do_not_fit_are_refused():
    joined, keys, values, positions = draw(SHAPES[0])
    half = jnp.zeros((3, 4))
    for wrong in (
        (joined[:, :60], keys, values, positions, (half, half)),
        (joined[:, :32], keys, values, positions, (half, half)),
        (joined[:2], keys, values, positions, (half, half)),
        (joined, keys, values[:, :, :5], positions, (half, half)),
        (joined, keys, values, positions[:2], (half, half)),
        (joined, keys, values, positions, (half, jnp.zeros((3, 8)))),
        (joined, keys.astype("float16"), values, positions, (half, half)),
    ):
        with pytest.raises((ValueError, TypeError), match=r"decode_step|shape"):
            decode_step(*wrong)
    with pytest.raises(ValueError, match="window=0 must be positive"):
        decode_step(joined, keys, values, positions, (half, half), window=0)
