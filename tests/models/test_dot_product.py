import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models import dot_product

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 10, 4, 2, 8


def draw(dtype="float32", length=LENGTH):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    segments = jnp.asarray(np.sort(rng.integers(0, 4, size=(BATCH, length)), axis=1), jnp.int32)
    segments = jnp.where(segments == 0, dot_product.SEEN_BY_ALL, segments)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], segments


def by_hand(query, keys, values, segments, window):
    out = np.zeros(query.shape)
    for row, place, head in np.ndindex(query.shape[:3]):
        seen = [
            other
            for other in range(max(0, place + 1 - (window or LENGTH)), place + 1)
            if segments is None or segments[row, other] in (segments[row, place], -1)
        ]
        group = head // (HEADS // KV_HEADS)
        weights = np.exp(keys[row, seen, group] @ query[row, place, head] / HEAD_DIM**0.5)
        out[row, place, head] = weights / weights.sum() @ values[row, seen, group]
    return out


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [1, 3, 10])
def test_output_does_not_depend_on_how_queries_are_cut(chunks, window, documents):
    arrays, segments = draw()
    scores = BATCH * HEADS * LENGTH * LENGTH * 4
    options = {"segments": segments if documents else None, "window": window, "implementation": "chunked"}
    options["max_score_bytes"] = -(-scores // chunks)
    got = jax.jit(functools.partial(dot_product.self_attention, **options))(*arrays)
    query, keys, values = map(np.asarray, arrays)
    expected = by_hand(query, keys, values, np.asarray(segments) if documents else None, window)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("dtype", "num_keys"), [("uint32", 4), ("int8", 300), ("uint8", 200)])
def test_positions_may_be_unsigned_or_narrow(dtype, num_keys):
    (query, *_), (_, keys, values) = draw(length=4)[0], draw(length=num_keys)[0]
    positions = jnp.array([[0, 1, 2, 3]])
    with jax.numpy_dtype_promotion("strict"):
        expected, found = (
            dot_product.attention(query, keys, values, positions=positions.astype(kind)) for kind in ("int32", dtype)
        )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found[:, 0, ::2], values[:, 0], rtol=1e-6)


def test_gradients_of_chunks_are_those_of_the_whole_and_hold_no_square_of_scores():
    arrays, segments = draw(length=64)

    def compiled(limit):
        options = {"window": None, "implementation": "chunked", "max_score_bytes": limit}
        loss = lambda *arrays: jnp.sum(jnp.sin(dot_product.self_attention(*arrays, segments=segments, **options)))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()

    scores = BATCH * HEADS * 64 * 64 * 4
    whole, chunked = compiled(scores), compiled(scores // 16)
    for one, other in zip(whole(*arrays), chunked(*arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    temporary = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    assert temporary(whole) > scores > temporary(chunked)


def answer_by_xla(monkeypatch):
    """Calls meant for cuDNN's kernel are answered by XLA's, which has the same interface; returns their names."""
    asked, plain = [], jax.nn.dot_product_attention

    def answer(*arrays, implementation, **options):
        asked.append(implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return asked


def test_cudnn_is_asked_for_the_same_attention(monkeypatch):
    arrays, segments = draw()
    options = {"segments": segments, "window": 3}
    with monkeypatch.context() as patch:
        asked = answer_by_xla(patch)
        got = dot_product.self_attention(*arrays, **options, implementation="cudnn")
        assert asked == ["cudnn"]
    expected = dot_product.self_attention(*arrays, **options, implementation="chunked")
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_cached_attention_is_that_of_the_last_tokens(window, monkeypatch):
    (query, keys, values), _ = draw()
    positions = jnp.broadcast_to(jnp.arange(6, LENGTH), (BATCH, 4))
    expected = by_hand(np.asarray(query), np.asarray(keys), np.asarray(values), None, window)[:, 6:]
    asked = answer_by_xla(monkeypatch)
    monkeypatch.setattr(dot_product, "why_not", lambda name, dtype, head_dim, length: None)
    scores = BATCH * HEADS * 4 * LENGTH * 4
    for implementation, few, name in (
        *((None, scores - 1, "cudnn"), ("cudnn", scores - 1, "cudnn")),
        *((None, scores, "xla"), ("chunked", scores - 1, "xla")),
    ):
        monkeypatch.setattr(dot_product, "_FEW_SCORE_BYTES", few)
        got = dot_product.cached_attention(
            query[:, 6:], keys, values, positions=positions, window=window, implementation=implementation
        )
        assert asked.pop() == name
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    monkeypatch.setattr(dot_product, "why_not", lambda name, dtype, head_dim, length: "odd" if length % 2 else None)
    options = {"positions": positions, "window": window, "implementation": None}
    monkeypatch.setattr(dot_product, "_FEW_SCORE_BYTES", 0)
    dot_product.cached_attention(query[:, 6:], keys[:, :9], values[:, :9], **options)
    assert asked == ["xla"]


def test_cached_attention_of_a_symbolic_batch_is_exported(monkeypatch):
    (query, keys, values), _ = draw()
    expected = by_hand(np.asarray(query), np.asarray(keys), np.asarray(values), None, None)
    monkeypatch.setattr(dot_product, "why_not", lambda name, dtype, head_dim, length: "odd" if length % 2 else None)

    def run(query, keys, values):
        positions = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
        options = {"positions": positions, "window": None, "implementation": None}
        return dot_product.cached_attention(query, keys, values, **options)

    (batch,) = jax.export.symbolic_shape("b")
    of = lambda array: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)
    exported = jax.export.export(jax.jit(run))(of(query), of(keys), of(values))
    np.testing.assert_allclose(exported.call(query, keys, values), expected, rtol=2e-5, atol=2e-6)


class Gpu:
    compute_capability = "9.0"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "length", "capability", "reason"),
    [
        ("bfloat16", 64, 10, "9.0", None),
        ("float16", 256, 10, "9.0", None),
        ("float32", 64, 10, "9.0", "needs bfloat16 or float16, found float32"),
        ("bfloat16", 256, 10, "8.6", "a multiple of 8 and at most 128, found 256"),
        ("bfloat16", 68, 10, "9.0", "a multiple of 8 and at most 256, found 68"),
        ("bfloat16", 64, 10, "7.5", "needs compute capability 8.0, found 7.5"),
        ("bfloat16", 64, 11, "9.0", "needs an even number of tokens in a row, found 11"),
    ],
)
def test_cudnn_says_why_it_cannot_run(dtype, head_dim, length, capability, reason, monkeypatch):
    monkeypatch.setattr(Gpu, "compute_capability", capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    found = dot_product.why_not("cudnn", dtype, head_dim, length)
    assert found == reason or (reason and reason in found)
    assert dot_product.choose(None, dtype, head_dim, length) == ("chunked" if reason else "cudnn")


def test_a_named_implementation_is_used_or_refused():
    assert dot_product.choose("chunked", "float32", 64, 10) == "chunked"
    with pytest.raises(NotImplementedError, match=r"attention='cudnn' cannot run: needs an NVIDIA GPU, found cpu"):
        dot_product.choose("cudnn", "bfloat16", 64, 10)
    with pytest.raises(ValueError, match=r"attention='flash' is unknown; known: cudnn, chunked"):
        dot_product.choose("flash", "bfloat16", 64, 10)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_gives_what_chunks_give(window, documents):
    arrays, segments = draw("bfloat16")

    def run(implementation):
        def loss(*arrays):
            options = {"segments": segments if documents else None, "window": window}
            out = dot_product.self_attention(*arrays, **options, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    # bfloat16 has eight bits of precision, and cuDNN rounds the weights to it before it sums the values.
    for one, other in zip(jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("chunked")), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_gives_what_chunks_give_over_a_cache(window, monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (3, 128, 4, 64), jnp.bfloat16)
    cache = [jax.random.normal(key, (3, 512, 2, 64), jnp.bfloat16) for key in keys[1:]]
    # The last row's tokens pass the end of the cache, as padding does.
    positions = jnp.asarray([[0], [200], [450]]) + jnp.arange(128)[None]
    monkeypatch.setattr(dot_product, "_FEW_SCORE_BYTES", 0)
    run = lambda name: dot_product.cached_attention(
        query, *cache, positions=positions, window=window, implementation=name
    )
    one, other = (jax.jit(run, static_argnums=0)(name).astype(jnp.float32) for name in (None, "chunked"))
    np.testing.assert_allclose(one, other, rtol=3e-2, atol=3e-2)
