from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import filled
from memjax.config.model import ModelConfig
from memjax.models.attention import Attention, KeyValues, write

DIM, HEADS, LENGTH, THETA = 8, 4, 6, 100.0


def turn(x, positions):
    """Rotary embedding of x [s, h] by complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(positions, THETA ** (-np.arange(half) / half)))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def normed(heads, norm):
    """RMS-normalises heads [s, n, h], each head alone or all heads of a token together, and scales them."""
    if norm is None:
        return heads
    scale = np.asarray(norm.scale[...], np.float64)
    vectors = heads.reshape(len(heads), -1, len(scale))
    squares = np.mean(vectors**2, axis=-1, keepdims=True)
    return (vectors / np.sqrt(squares + norm.epsilon) * scale).reshape(heads.shape)


def by_hand(layer, x, positions, segments, window=LENGTH):
    """Causal attention, one sequence, head and token at a time."""

    def times(inputs, part):
        bias = 0 if part.bias is None else np.asarray(part.bias[...], np.float64)
        return inputs @ np.asarray(part.kernel[...], np.float64) + bias

    head_dim = layer.query.kernel.shape[1] // HEADS
    out = np.zeros(x.shape)
    for row in range(len(x)):
        query, key, value = (
            times(x[row], part).reshape(LENGTH, -1, head_dim) for part in (layer.query, layer.key, layer.value)
        )
        query, key = normed(query, layer.query_norm), normed(key, layer.key_norm)
        heads = np.zeros((LENGTH, HEADS, head_dim))
        for head in range(HEADS):
            group = head // (HEADS // key.shape[1])
            queries, keys = turn(query[:, head], positions[row]), turn(key[:, group], positions[row])
            for token in range(LENGTH):
                near = range(max(0, token + 1 - window), token + 1)
                seen = [other for other in near if segments[row, other] == segments[row, token]]
                weights = np.exp(keys[seen] @ queries[token] / head_dim**0.5)
                heads[token, head] = weights / weights.sum() @ value[seen, group]
        out[row] = times(heads.reshape(LENGTH, -1), layer.out)
    return out


@cache
def build(num_kv_heads, dtype="float32", **more):
    config = ModelConfig(dim=DIM, num_heads=HEADS, num_kv_heads=num_kv_heads, rope_theta=THETA, **more)
    layer = filled(lambda: Attention(config, param_dtype=dtype, rngs=nnx.Rngs(0)), seed=1)
    return layer, np.random.default_rng(0).normal(size=(2, LENGTH, DIM)).astype(dtype)


run = nnx.jit(lambda layer, *arguments: layer(*arguments))

COUNTING = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
SEGMENTS = np.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 3, 3]], np.int32)
RESTARTING = np.asarray([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1]], np.int32)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_output_is_causal_attention_within_documents(num_kv_heads, documents, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        layer, x = build(num_kv_heads, dtype)
        positions, segments = (RESTARTING, SEGMENTS) if documents else (COUNTING, None)
        got = run(layer, x, positions, segments)
        assert got.dtype == dtype
        expected = by_hand(layer, x, positions, np.zeros_like(COUNTING) if segments is None else segments)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_projections_may_have_biases_and_heads_any_width():
    with jax.enable_x64(True):
        layer, x = build(2, "float64", attention_bias=True, head_dim=6)
        assert layer.out.kernel.shape == (HEADS * 6, DIM)
        expected = by_hand(layer, x, COUNTING, np.zeros_like(COUNTING))
        np.testing.assert_allclose(run(layer, x, COUNTING), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("qk_norm", "sizes"), [("per_head", (2, 2)), ("all_heads", (8, 4))])
def test_queries_and_keys_may_be_normed_by_head_or_over_all_heads(qk_norm, sizes):
    with jax.enable_x64(True):
        layer, x = build(2, "float64", qk_norm=qk_norm, norm_eps=1e-3)
        assert layer.query_norm is not None
        assert layer.key_norm is not None
        assert (layer.query_norm.scale.shape, layer.key_norm.scale.shape) == ((sizes[0],), (sizes[1],))
        expected = by_hand(layer, x, COUNTING, np.zeros_like(COUNTING))
        np.testing.assert_allclose(run(layer, x, COUNTING), expected, rtol=1e-12, atol=1e-12)
        extend = nnx.jit(lambda layer, *arguments: layer.with_cache(*arguments))
        _, cache = extend(layer, x[:, :5], COUNTING[:, :5], KeyValues(*jnp.zeros((2, 2, 2, LENGTH, 2))))
        last, _ = extend(layer, x[:, 5:], COUNTING[:, 5:], cache)
        np.testing.assert_allclose(last[:, 0], expected[:, 5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "documents"), [(1, False), (3, False), (3, True), (LENGTH + 1, True), (2**31, False)]
)
def test_a_window_hides_all_but_the_nearest_tokens(window, documents):
    with jax.enable_x64(True):
        layer, x = build(2, "float64", sliding_window=window)
        positions, segments = (RESTARTING, SEGMENTS) if documents else (COUNTING, None)
        got = run(layer, x, positions, segments)
        expected = by_hand(layer, x, positions, np.zeros_like(COUNTING) if segments is None else segments, window)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("float64", None), ("float64", 2)])
def test_cache_filled_in_pieces_gives_what_all_tokens_at_once_give(dtype, window):
    with jax.enable_x64(dtype == "float64"):
        layer, x = build(2, dtype, sliding_window=window)
        expected = run(layer, x, COUNTING)
        # Longer than the sequence, with garbage where nothing has been written yet.
        cache = KeyValues(*(jnp.full((2, 2, LENGTH + 3, DIM // HEADS), 7.0, dtype) for _ in range(2)))
        extend = nnx.jit(lambda layer, *arguments: layer.with_cache(*arguments))
        pieces, start = [], 0
        for length in (3, 1, 1, 1):
            place = slice(start, start + length)
            out, cache = extend(layer, x[:, place], COUNTING[:, place], cache)
            pieces.append(out)
            start += length
        tolerance = 1e-12 if dtype == "float64" else 2e-5
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=tolerance, atol=tolerance)
        assert np.all(np.asarray(cache.keys)[:, :, LENGTH:] == 7)


def test_rows_of_a_cache_have_their_own_positions():
    layer, x = build(2)
    expected = run(layer, x, COUNTING)
    cache = KeyValues(*(jnp.full((2, 2, LENGTH + 2, DIM // HEADS), 7.0) for _ in range(2)))
    extend = nnx.jit(lambda layer, *arguments: layer.with_cache(*arguments))
    # The first row begins with four tokens, the second with two and padding that new tokens overwrite.
    _, cache = extend(layer, x[:, :4], COUNTING[:, :4], cache)
    for step in range(2):
        places = np.asarray([[4 + step], [2 + step]], np.int32)
        out, cache = extend(layer, x[np.arange(2)[:, None], places], places, cache)
        np.testing.assert_allclose(out[0, 0], expected[0, 4 + step], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(out[1, 0], expected[1, 2 + step], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("by_rows", [False, True])
def test_entries_are_written_at_the_places_of_their_rows_and_not_beyond_the_cache(by_rows):
    rng = np.random.default_rng(0)
    cache, new = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 2, 3, 4))
    places = np.array([[1, 2], [4, 5]], np.int32)
    expected = cache.copy()
    for row, number in ((0, 0), (0, 1), (1, 0)):
        expected[row, :, places[row, number]] = new[row, number]
    found = write(jnp.asarray(cache, jnp.float32), jnp.asarray(new, jnp.float32), jnp.asarray(places), by_rows=by_rows)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
