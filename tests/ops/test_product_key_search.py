import importlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.ops import tiles
from memjax.ops.product_key_search.api import product_key_search, weighted_search

IMPLEMENTATIONS = ["triton", "xla", "reference"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Two of them also in chunks of two tokens, with an incomplete last chunk.
TRITON_FORMS, XLA_FORMS = ["triton", "triton in chunks"], ["xla", "reference", "xla in chunks"]
every_form = pytest.mark.parametrize("form", TRITON_FORMS + XLA_FORMS)
every_xla_form = pytest.mark.parametrize("form", XLA_FORMS)
every_triton_form = pytest.mark.parametrize("form", TRITON_FORMS)
# Triton's interpreter is about a thousand times slower than the other implementations.
few_examples = settings(max_examples=max(2, settings().max_examples // 12))

# Batch axes, heads, sub-keys per half, width of a half, top_k, dtype.
SHAPES = [
    ((5,), 2, 6, 3, 4, "float32"),
    ((2, 3), 1, 5, 1, 5, "float32"),
    ((1, 3, 1), 3, 7, 2, 1, "float32"),
    ((3,), 1, 16, 4, 16, "bfloat16"),
    ((1,), 2, 9, 3, 4, "float32"),
]
# In these, all sums are exact or rounded only once, so the scores must be bit-identical.
EXACT = ("ties", "all equal", "last bits")


def draw(seed, shape, values):
    batch, num_heads, num_keys, half, top_k, dtype = shape
    rng = np.random.default_rng(seed)
    queries, keys = (*batch, num_heads, 2 * half), (num_heads, 2, num_keys, half)
    if values == "normal":
        queries, keys = rng.normal(size=queries), rng.normal(size=keys)
    elif values == "ties":
        queries, keys = rng.integers(-1, 2, size=queries), rng.integers(-1, 2, size=keys)
    elif values == "all equal":
        queries, keys = np.full(queries, rng.integers(-2, 3)), np.full(keys, rng.integers(-2, 3))
    else:
        # Scores differ by one unit in the last place, so that many sums round to the same number.
        queries, last_bits = np.ones(queries), rng.permuted(np.arange(num_keys)[:, None] * np.ones(half), axis=0)
        keys = np.broadcast_to((1 + last_bits * 2.0**-23) * (np.arange(half) == 0), keys)
        dtype = "float32"
    return jnp.asarray(queries, dtype), jnp.asarray(keys, dtype), top_k


def brute_force(queries, keys):
    """Scores of all slots, [..., heads, n * n]: half scores in float64, rounded to float32, added in float32."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    _num_heads, _, num_keys, half = keys.shape
    scores = np.zeros((*queries.shape[:-1], num_keys**2), np.float32)
    for place in np.ndindex(queries.shape[:-1]):
        left = (keys[place[-1], 0] @ queries[place][:half]).astype(np.float32)
        right = (keys[place[-1], 1] @ queries[place][half:]).astype(np.float32)
        scores[place] = np.add.outer(left, right).reshape(-1)
    return scores


@cache
def compiled(form, top_k, chunk_bytes=None):
    run = partial(product_key_search, top_k=top_k, implementation=form.split()[0], chunk_bytes=chunk_bytes)
    return jax.jit(run)


def chunk_of(form, keys):
    """The size of a chunk of two tokens, if the form asks for chunks."""
    return 2 * 8 * keys.shape[0] * keys.shape[2] if "in chunks" in form else None


def search(form, queries, keys, top_k):
    return compiled(form, top_k, chunk_of(form, keys))(queries, keys)


seeds = st.integers(0, 2**32 - 1)


def check_slots_are_the_best_of_all_pairs(form, seed, shape, values):
    queries, keys, top_k = draw(seed, shape, values)
    scores, slots = search(form, queries, keys, top_k)
    assert scores.dtype == jnp.float32
    assert slots.dtype == jnp.int32
    scores, slots = np.asarray(scores), np.asarray(slots)
    every = brute_force(queries, keys)
    assert np.all(np.diff(scores) <= 0), "best first"
    assert all(len(set(row)) == top_k for row in slots.reshape(-1, top_k)), "slots are distinct"
    # Half scores are at most half * max |q| * max |k|, and each of their products and sums is rounded once.
    bound = 4 * np.finfo(np.float32).eps * keys.shape[-1] ** 2 * np.abs(queries).max() * np.abs(keys).max()
    tolerance = 0 if values in EXACT else float(bound)
    np.testing.assert_allclose(scores, -np.sort(-every, axis=-1)[..., :top_k], rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, np.take_along_axis(every, slots, axis=-1), rtol=0, atol=tolerance)


@every_xla_form
@given(seed=seeds, shape=st.sampled_from(SHAPES), values=st.sampled_from(["normal", *EXACT]))
def test_slots_are_the_best_of_all_pairs(form, seed, shape, values):
    check_slots_are_the_best_of_all_pairs(form, seed, shape, values)


@every_triton_form
@few_examples
@given(seed=seeds, shape=st.sampled_from(SHAPES), values=st.sampled_from(["normal", *EXACT]))
def test_slots_are_the_best_of_all_pairs_in_triton(form, seed, shape, values):
    check_slots_are_the_best_of_all_pairs(form, seed, shape, values)


def check_nan_in_gives_nan_out_and_slots_stay_distinct(form, seed, shape):
    queries, keys, top_k = draw(seed, shape, "normal")
    first = (0,) * (queries.ndim - 2)
    clean, _ = search(form, queries, keys, top_k)
    scores, slots = search(form, queries.at[(*first, 0, 0)].set(jnp.nan), keys, top_k)
    lost = np.zeros(scores.shape, bool)
    lost[(*first, 0)] = True
    np.testing.assert_array_equal(np.isnan(scores), lost)
    np.testing.assert_array_equal(np.asarray(scores)[~lost], np.asarray(clean)[~lost])

    by_key, slots_by_key = search(form, queries, keys.at[0, 1, 3].set(jnp.nan), top_k)
    assert np.isnan(by_key[..., 0, 0]).all()
    for found in (slots, slots_by_key):
        assert all(len(set(row)) == top_k for row in np.asarray(found).reshape(-1, top_k))
        assert np.min(found) >= 0
        assert np.max(found) < keys.shape[2] ** 2


@every_xla_form
@given(seed=seeds, shape=st.sampled_from(SHAPES[:2]))
def test_nan_in_gives_nan_out_and_slots_stay_distinct(form, seed, shape):
    check_nan_in_gives_nan_out_and_slots_stay_distinct(form, seed, shape)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["triton"])
@few_examples
@given(seed=seeds, shape=st.just(SHAPES[1]))
def test_nan_in_gives_nan_out_and_slots_stay_distinct_in_triton(form, seed, shape):
    check_nan_in_gives_nan_out_and_slots_stay_distinct(form, seed, shape)


@pytest.mark.parametrize(
    ("num", "top_k", "values"),
    [
        (16, 16, "all equal"),
        (100, 3, "two values"),
        (1024, 1, "two values"),
        (1024, 32, "normal"),
        (1024, 33, "1 + i * 2**-23"),
        pytest.param(4096, 32, "two values", marks=pytest.mark.slow),
        pytest.param(8192, 64, "1 + i * 2**-23", marks=pytest.mark.slow),
    ],
)
def test_selection_from_long_rows_is_exact(num, top_k, values):
    rng = np.random.default_rng(num + top_k)
    rows = {
        "normal": rng.normal(size=(1, num)),
        "1 + i * 2**-23": 1 + rng.permuted(np.arange(num)[None], axis=1) * 2.0**-23,
        "two values": rng.integers(2, size=(1, num)),
        "all equal": np.full((1, num), -0.5),
    }[values].astype(np.float32)
    select = importlib.import_module("memjax.ops.product_key_search.triton_select").select
    best, places = select(jnp.asarray(rows), top_k=top_k)
    np.testing.assert_array_equal(best, -np.sort(-rows, axis=1)[:, :top_k])
    np.testing.assert_array_equal(np.take_along_axis(rows, np.asarray(places), axis=1), best)
    assert all(len(set(row)) == top_k for row in np.asarray(places))


@pytest.mark.parametrize("values", ["ties", "last bits"])
def test_pairs_chosen_by_rank_or_sorted_are_the_same(values):
    queries, keys, top_k = draw(3, ((1,), 1, 8, 3, 5, "float32"), values)
    find = importlib.import_module("memjax.ops.product_key_search.triton").product_key_search
    ranked = find(queries, keys, top_k)
    with tiles.override("pair_few", by_rank=False):
        scores, slots = find(queries, keys, top_k)
    np.testing.assert_array_equal(ranked[0], scores)
    # Both break ties in the same way.
    np.testing.assert_array_equal(ranked[1], slots)


@every_implementation
def test_weights_are_the_softmax_of_scaled_scores(implementation):
    queries, keys, top_k = draw(4, ((2,), 2, 6, 3, 5, "float32"), "normal")
    queries = queries.at[0, 1, 0].set(jnp.nan)
    weights, slots = weighted_search(queries, keys, top_k, scale=0.7, implementation=implementation)
    scores, expected = product_key_search(queries, keys, top_k, implementation=implementation)
    np.testing.assert_array_equal(slots, expected)
    powers = np.exp(0.7 * np.asarray(scores, np.float64))
    np.testing.assert_allclose(weights, powers / powers.sum(axis=-1, keepdims=True), rtol=1e-6)
    assert np.isnan(weights[0, 1]).all()
    assert not np.isnan(weights[1:]).any()


@cache
def compiled_gradient(form, top_k, chunk_bytes):
    def loss(queries, keys, factors):
        name = form.split()[0]
        scores, _ = product_key_search(queries, keys, top_k, implementation=name, chunk_bytes=chunk_bytes)
        return jnp.sum(factors * scores)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def numeric_gradient(function, array, step=1e-6):
    gradient = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        shift = np.zeros(array.shape)
        shift[place] = step
        gradient[place] = (function(array + shift) - function(array - shift)) / (2 * step)
    return gradient


@every_xla_form
@given(seed=seeds)
def test_gradients_equal_finite_differences(form, seed):
    rng = np.random.default_rng(seed)
    num_heads, num_keys, half, top_k = 2, 4, 2, 3
    queries, keys = rng.normal(size=(3, num_heads, 2 * half)), rng.normal(size=(num_heads, 2, num_keys, half))
    factors = rng.normal(size=(3, num_heads, top_k))

    def best_scores(queries, keys):
        left = np.einsum("thd,hnd->thn", queries[..., :half], keys[:, 0])
        right = np.einsum("thd,hnd->thn", queries[..., half:], keys[:, 1])
        every = (left[..., :, None] + right[..., None, :]).reshape(3, num_heads, num_keys**2)
        return -np.sort(-every, axis=-1)

    # The derivative jumps where two of the best swap ranks; skip the rare case that is this close.
    if np.min(-np.diff(best_scores(queries, keys)[..., : top_k + 1])) < 1e-4:
        return
    with jax.enable_x64(True):
        d_queries, d_keys = compiled_gradient(form, top_k, chunk_of(form, keys))(queries, keys, factors)
    assert d_queries.dtype == d_keys.dtype == np.float64

    def loss(queries, keys):
        return np.sum(factors * best_scores(queries, keys)[..., :top_k])

    np.testing.assert_allclose(d_queries, numeric_gradient(lambda q: loss(q, keys), queries), atol=1e-7)
    np.testing.assert_allclose(d_keys, numeric_gradient(lambda k: loss(queries, k), keys), atol=1e-7)


@every_form
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_form_agree(form, shape):
    queries, keys, top_k = draw(5, shape, "normal")
    factors = jnp.asarray(np.random.default_rng(6).normal(size=(*queries.shape[:-1], top_k)), jnp.float32)
    got = compiled_gradient(form, top_k, chunk_of(form, keys))(queries, keys, factors)
    for mine, other in zip(got, compiled_gradient("reference", top_k, None)(queries, keys, factors), strict=True):
        assert mine.dtype == other.dtype
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        scale = np.abs(other).max() * float(jnp.finfo(keys.dtype).eps)
        np.testing.assert_allclose(mine, other, atol=8 * scale, rtol=0)


def test_float64_is_not_for_triton():
    with jax.enable_x64(True):
        queries, keys, top_k = jnp.ones((3, 1, 4)), jnp.ones((1, 2, 4, 2)), 2
        with pytest.raises(NotImplementedError, match="'triton' cannot run: its kernels accumulate in float32"):
            product_key_search(queries, keys, top_k, implementation="triton")
        assert product_key_search(queries, keys, top_k)[0].dtype == jnp.float64


@every_implementation
def test_gradients_keep_the_types_of_queries_and_keys(implementation):
    queries, keys, top_k = draw(0, SHAPES[3], "normal")

    def loss(queries, keys):
        return product_key_search(queries, keys, top_k, implementation=implementation)[0].sum()

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), queries, keys)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


@every_implementation
def test_vmap_equals_a_loop(implementation):
    queries, keys, top_k = draw(0, SHAPES[1], "normal")
    run = compiled(implementation, top_k)
    scores, slots = jax.jit(jax.vmap(run, in_axes=(0, None)))(queries, keys)
    for number in range(2):
        expected_scores, expected_slots = run(queries[number], keys)
        np.testing.assert_allclose(scores[number], expected_scores, rtol=1e-6)
        np.testing.assert_array_equal(slots[number], expected_slots)


def test_xla_form_holds_neither_all_pairs_nor_the_half_scores_of_all_tokens(equations_of):
    tokens, num_heads, num_keys, top_k = 64, 2, 32, 4
    queries, keys = jnp.ones((tokens, num_heads, 2)), jnp.ones((num_heads, 2, num_keys, 1))

    def largest(implementation, chunk_bytes=None):
        def loss(queries, keys):
            options = {"implementation": implementation, "chunk_bytes": chunk_bytes}
            return product_key_search(queries, keys, top_k, **options)[0].sum()

        found = equations_of(jax.value_and_grad(loss, argnums=(0, 1)), queries, keys)
        return max(int(np.prod(shape)) for equation in found for shape in equation.shapes)

    half_scores = tokens * num_heads * 2 * num_keys
    assert largest("reference") >= tokens * num_heads * num_keys**2
    assert half_scores <= largest("xla") < tokens * num_heads * num_keys**2
    assert largest("xla", 4 * half_scores // 16) < half_scores


def test_sizes_that_do_not_fit_are_refused():
    keys = jnp.ones((2, 2, 4, 3))
    with pytest.raises(ValueError, match=r"top_k=5 must be in 1\.\.n=4"):
        product_key_search(jnp.ones((1, 2, 6)), keys, 5)
    with pytest.raises(ValueError, match=r"top_k=0 must be in 1\.\.n=4"):
        product_key_search(jnp.ones((1, 2, 6)), keys, 0)
    with pytest.raises(TypeError):  # and the cached program for 2 is not reused for 2.0
        product_key_search(jnp.ones((1, 2, 6)), keys, 2.0)  # pyright: ignore[reportArgumentType]
    product_key_search(jnp.ones((1, 2, 6)), keys, 2)
    with pytest.raises(
        ValueError,
        match=r"product_key_search: queries must be .* found queries float32\[.*2, 4\], keys float32\[2, 2, 4, 3\]",
    ):
        product_key_search(jnp.ones((1, 2, 4)), keys, 2)
