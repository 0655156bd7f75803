import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig
from memjax.models import decoder
from memjax.models.block import Block
from memjax.models.feed_forward import FeedForward
from memjax.models.loss import summed_loss
from memjax.models.parts import DecoderParts, split_decoder
from memjax.ops.precision import resolve_dtype
from memjax.ops.product_key_search.api import product_key_search

SIZES: dict[str, Any] = {"dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": 40}
MEMORY: dict[str, Any] = {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": 8, "value_dim": 12}
EXPERTS: dict[str, Any] = {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": 8}
CONFIGS = {
    "dense": ModelConfig(**SIZES, num_layers=1, memory=None),
    "shared tables": ModelConfig(
        **SIZES,
        num_layers=3,
        tie_embeddings=True,
        memory=MemoryConfig(**MEMORY, layers=(0, 1)),
        peer=PEERConfig(**EXPERTS, layers=(2,)),
    ),
    "own tables": ModelConfig(
        **SIZES,
        num_layers=4,
        memory=MemoryConfig(**MEMORY, layers=(0, 2), shared_table=False),
        peer=PEERConfig(**EXPERTS, layers=(1, 3), shared_table=False),
    ),
    "experts": ModelConfig(
        **SIZES,
        num_layers=3,
        memory=MemoryConfig(**MEMORY, layers=(2,)),
        experts=ExpertsConfig(layers=(0,), num_experts=3, ffn_dim=20),
    ),
    "post-norms": ModelConfig(
        **SIZES,
        num_layers=3,
        memory=MemoryConfig(**MEMORY, layers=(0,), placement="parallel"),
        peer=PEERConfig(**EXPERTS, layers=(1,)),
        qk_norm="all_heads",
        norm_placement="post",
    ),
    "beside": ModelConfig(**SIZES, num_layers=2, memory=MemoryConfig(**MEMORY, layers=(1,), placement="parallel")),
}
TOKENS = np.random.default_rng(0).integers(40, size=(2, 7)).astype(np.int32)


@cache
def build(name):
    """A decoder with random numbers, since compiling its own initialisation takes seconds."""
    parts, rng = DecoderParts.of(CONFIGS[name]), np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-1] ** -0.5 if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)

    return parts.merge(*jax.tree.map(draw, (parts.abstract_params, parts.abstract_tables)))


call = nnx.jit(lambda layer, *arguments: layer(*arguments))


def norm(layer, x):
    scale = np.asarray(layer.scale[...], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_layers_put_together_by_hand(name):
    """Calls the layers one by one; each kind of layer has its own tests."""
    model, config = build(name), CONFIGS[name]
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), TOKENS.shape)
    embedding = np.asarray(model.embed.embedding[...], np.float64)

    def narrow(x):
        return jnp.asarray(x, jnp.float32)

    x = embedding[TOKENS]
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        before, after = (norm, lambda _, x: x) if config.norm_placement == "pre" else (lambda _, x: x, norm)
        attended = np.asarray(call(block.attention, narrow(before(block.attention_norm, x)), positions))
        x = x + after(block.attention_norm, attended)
        inputs, outs = narrow(before(block.mixer_norm, x)), np.zeros(x.shape)
        memory = config.memory if config.memory and number in config.memory.layers else None
        if memory is not None:
            table = model.tables["shared" if memory.shared_table else f"layer_{number}"]
            outs += np.asarray(call(block.lookup, inputs, table))
        lookup = config.peer if config.kind(number) == "peer" else None
        if lookup is not None:
            pool = "experts" if lookup.shared_table else f"experts_{number}"
            tables = (model.tables[f"{pool}_{which}"] for which in ("inputs", "outputs"))
            outs += np.asarray(call(block.lookup, inputs, *tables))
            assert block.feed_forward is None
        elif config.kind(number) == "experts":
            outs += np.asarray(call(block.experts, inputs)[0])
        elif memory is None or memory.placement == "parallel":
            assert isinstance(block.feed_forward, FeedForward)
            outs += np.asarray(call(block.feed_forward, inputs))
        x = x + after(block.mixer_norm, outs)
    output = embedding.T if model.head is None else np.asarray(model.head.kernel[...], np.float64)
    assert (model.head is None) == config.tie_embeddings
    logits = call(model, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, norm(model.norm, x) @ output, rtol=1e-4, atol=1e-4)


def test_tables_are_owned_by_the_decoder_one_or_two_for_each_pool():
    def tables(name):
        return {pool: table.rows[...].shape for pool, table in build(name).tables.items()}

    assert tables("dense") == {}
    pair = lambda pool: {f"{pool}_inputs": (25, 16), f"{pool}_outputs": (25, 16)}
    assert tables("shared tables") == {"shared": (25, 12)} | pair("experts")
    memories = {"layer_0": (25, 12), "layer_2": (25, 12)}
    assert tables("own tables") == memories | pair("experts_1") | pair("experts_3")
    first, second = (build("own tables").tables[pool].rows[...] for pool in ("layer_0", "layer_2"))
    assert np.any(first != second)


@pytest.mark.parametrize("name", ["dense", "shared tables"])
def test_packed_documents_get_what_they_get_alone(name):
    model = build(name)
    lengths = [3, 3, 1]
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)[None]
    segments = np.repeat(np.arange(1, 4), lengths).astype(np.int32)[None]
    hidden = nnx.jit(lambda model, *arguments: model.hidden(*arguments)[0])
    packed = hidden(model, TOKENS[:1], positions, segments)[0]
    start = 0
    for length in lengths:
        alone = hidden(model, TOKENS[:1, start : start + length])[0]
        np.testing.assert_allclose(packed[start : start + length], alone, rtol=1e-4, atol=1e-4)
        start += length


@pytest.mark.parametrize("name", ["dense", "own tables", "experts", "post-norms"])
def test_cache_filled_in_pieces_gives_what_all_tokens_at_once_give(name):
    model = build(name)
    expected = call(model, TOKENS)
    cache, pieces, start = model.init_cache(2, 9), [], 0
    extend = nnx.jit(lambda model, tokens, cache: model.with_cache(tokens, cache))
    for length in (4, 1, 1, 1):
        logits, cache = extend(model, TOKENS[:, start : start + length], cache)
        pieces.append(logits)
        start += length
    np.testing.assert_array_equal(cache.lengths, 7)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-4, atol=1e-4)


def loss_and_reads(parts, params, tables, perturbations, remat):
    model = parts.merge(params, tables)
    hidden, reads, *_ = model.hidden(jnp.asarray(TOKENS), perturbations=perturbations, remat=remat)
    return summed_loss(model, hidden, jnp.asarray(TOKENS[:, ::-1]), jnp.ones(TOKENS.shape))[0], reads


@cache
def compiled_gradient(remat, forget=False):
    """Compiles value_and_grad over parameters, tables and perturbations; `forget` overrides remat to recompute all."""
    parts, *arrays = split_decoder(build("shared tables"))
    policy = jax.checkpoint_policies.nothing_saveable
    wrap = (lambda function: jax.checkpoint(function, policy=policy)) if forget else (lambda function: function)
    loss = wrap(lambda params, tables, zeros: loss_and_reads(parts, params, tables, zeros, remat))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    arguments = (*arrays, parts.zero_perturbations(TOKENS.size))
    return compiled.lower(*arguments).compile(), arguments


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "block"])
def test_remat_leaves_loss_and_gradients_as_they_are(remat):
    (plain, arguments), (again, _) = compiled_gradient("none"), compiled_gradient(remat)
    expected, got = plain(*arguments), again(*arguments)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def count_searches(compiled):
    """Counts top-k selections in optimised code: a custom call on CPUs, an instruction or a sort elsewhere."""
    return len(re.findall(r'custom_call_target="[^"]*TopK[^"]*"| topk\(| sort\(', compiled.as_text()))


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_compiled_gradient_holds_one_search_for_each_layer_that_looks_up(remat):
    queries, keys = jnp.ones((14, 2, 8)), jnp.ones((2, 2, 5, 4))
    one = count_searches(
        jax.jit(lambda queries, keys: product_key_search(queries, keys, 3)).lower(queries, keys).compile()
    )
    assert one > 0
    assert count_searches(compiled_gradient(remat)[0]) == 3 * one


def test_searching_again_would_be_counted():
    compiled, _ = compiled_gradient("none", forget=True)
    assert count_searches(compiled) > count_searches(compiled_gradient("none")[0])


def test_reads_and_the_cotangents_of_their_perturbations_are_the_tables_gradient():
    compiled, arguments = compiled_gradient("block")
    (_, reads), (_, d_tables, cotangents) = compiled(*arguments)
    assert reads.keys() == cotangents.keys() == {"L0", "L1", "L2"}
    expected = {name: np.zeros(rows.shape) for name, rows in d_tables.items()}

    def add(table, indices, weights, vectors):
        indices, weights, vectors = (np.asarray(array) for array in (indices, weights, vectors))
        assert indices.shape == (14, 6)
        for token, pick in np.ndindex(indices.shape):
            expected[table][indices[token, pick]] += weights[token, pick] * vectors[token]

    for name in ("L0", "L1"):
        (read,), (cotangent,) = reads[name], cotangents[name]
        assert read.vectors is None
        add(read.table, read.indices, read.weights, cotangent)
    (inputs, outputs), (d_dots, d_bags) = reads["L2"], cotangents["L2"]
    assert (inputs.table, outputs.table) == ("experts_inputs", "experts_outputs")
    add(inputs.table, inputs.indices, d_dots, inputs.vectors)
    add(outputs.table, outputs.indices, outputs.weights, d_bags)
    for name, gradient in d_tables.items():
        assert np.any(gradient)
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_types_follow_the_config():
    assert resolve_dtype("auto") == (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    assert resolve_dtype("bfloat16") == jnp.bfloat16
    memory = MemoryConfig(**MEMORY, layers=(0,), table_dtype="bfloat16")
    parts = DecoderParts.of(ModelConfig(**SIZES, num_layers=1, dtype="bfloat16", memory=memory))
    assert {leaf.dtype for leaf in jax.tree.leaves(parts.abstract_params)} == {jnp.dtype("float32")}
    assert parts.abstract_tables["shared"].dtype == jnp.bfloat16

    def run(params, tables):
        return parts.merge(params, tables).hidden(jnp.asarray(TOKENS))[0]

    assert jax.eval_shape(run, parts.abstract_params, parts.abstract_tables).dtype == jnp.bfloat16

    def logits(params, tables):
        return parts.merge(params, tables)(jnp.asarray(TOKENS))

    assert jax.eval_shape(logits, parts.abstract_params, parts.abstract_tables).dtype == jnp.float32


@pytest.mark.slow
def test_value_and_grad_finds_the_reads_of_a_decoder():
    model = build("shared tables")

    def loss_fn(model):
        tokens = jnp.asarray(TOKENS)
        return summed_loss(model, model.hidden(tokens, remat="block").states, tokens, jnp.ones((2, 7)))[0]

    _, expected = nnx.jit(nnx.value_and_grad(loss_fn))(model)
    _, gradients = nnx.jit(memjax.value_and_grad(loss_fn))(model)
    for name, table in expected["tables"].items():
        total = sum(row.dense(25) for row in gradients.tables[f"tables.{name}"])
        np.testing.assert_allclose(total, table["rows"][...], rtol=1e-4, atol=1e-4)
    assert [len(rows) for rows in gradients.tables.values()] == [1, 1, 2]
    others = nnx.filter_state(expected, lambda path, _: path[0] != "tables")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients.dense, others)


def test_a_decoder_trains_by_rows():
    model, tokens = build("beside"), jnp.asarray(TOKENS)
    gradients = nnx.jit(memjax.value_and_grad(lambda model: model(tokens).sum()))(model)[1]
    (rows,) = [row for rows in gradients.tables.values() for row in rows]
    assert np.isfinite(rows.dense(25)).all()
    assert np.any(rows.dense(25))


def test_a_decoder_in_a_transformations_closure_is_named():
    loss_fn = lambda model: jax.checkpoint(lambda tokens: model.hidden(tokens).states.sum())(jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match="a Decoder is called inside a transformation of JAX"):
        jax.eval_shape(memjax.value_and_grad(loss_fn), build("beside"))


@pytest.mark.parametrize("name", ["positions", "segments"])
def test_positions_and_segments_must_be_integers(as_users_call, name):
    given: dict[str, Any] = {name: jnp.ones((2, 7))}
    with pytest.raises(ValueError, match=f"Decoder: {name} must be whole numbers; found {name} float32"):
        build("own tables").hidden(jnp.asarray(TOKENS), **given)


def test_masks_and_segments_may_be_zeros_and_ones_of_any_type(as_users_call):
    model, mask = build("experts"), np.arange(14).reshape(2, 7) % 3 > 0

    def states(one: Any, other: Any) -> np.ndarray:
        given: dict[str, Any] = {"token_mask": mask.astype(one), "segments": mask.astype(other)}
        hidden = nnx.jit(lambda model: model.hidden(jnp.asarray(TOKENS), training=True, **given).states)
        return np.asarray(hidden(model))

    np.testing.assert_array_equal(states(bool, np.int32), states(np.int32, bool))


@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (7,)], ids=str)
@pytest.mark.parametrize("name", ["positions", "segments", "token_mask"])
def test_arrays_for_other_tokens_are_refused(as_users_call, name, shape):
    given: dict[str, Any] = {name: jnp.ones(shape, bool if name == "token_mask" else jnp.int32)}
    sizes = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"{name} must have the shape of the tokens; found .*{name} \w+\[{sizes}\]"):
        build("own tables").hidden(jnp.asarray(TOKENS), **given)


@pytest.mark.parametrize("name", ["positions", "segments", "token_mask"])
def test_lists_in_place_of_arrays_are_refused(as_users_call, name):
    given: dict[str, Any] = {name: [[1] * 7] * 2}
    with pytest.raises(ValueError, match=f"{name} must have the shape of the tokens"):
        build("own tables").hidden(jnp.asarray(TOKENS), **given)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ["shared tables", "experts"])
def test_zero_tokens_give_no_logits(name, shape):
    assert build(name)(jnp.zeros(shape, jnp.int32)).shape == (*shape, SIZES["vocab_size"])


@pytest.mark.parametrize("tokens", [np.zeros(4, np.int32), np.zeros((1, 4)), [[1, 2]], "a text"], ids=repr)
def test_anything_but_a_batch_of_tokens_is_refused(as_users_call, tokens):
    with pytest.raises(ValueError, match=r"Decoder: tokens must be whole numbers \[batch, tokens\]; found tokens "):
        build("dense")(tokens)


@pytest.mark.parametrize("wrong", [-1, 40, 41])
def test_ids_outside_the_vocabulary_are_refused_and_are_nan_where_they_are_traced(as_users_call, wrong):
    model, tokens = build("dense"), np.array([[3, 5, wrong, 7], [3, 5, 6, 7]], np.int32)
    given: Any
    for given in (tokens, jnp.asarray(tokens)):
        with pytest.raises(ValueError, match=rf"tokens hold {wrong}; the model knows 0\.\.39"):
            model(given)
        with pytest.raises(ValueError, match=rf"tokens hold {wrong}; the model knows 0\.\.39"):
            model.with_cache(given, model.init_cache(2, 4))
        with pytest.raises(ValueError, match=rf"tokens hold {wrong}; the model knows 0\.\.39"):
            model.hidden_with_cache(given[:, 2:3], None)
    logits = np.asarray(call(model, tokens))
    assert np.isnan(logits[0, 2:]).all()
    np.testing.assert_array_equal(logits[1], np.asarray(call(model, tokens[[1, 1]]))[1])


def test_a_cached_step_of_one_token_reads_no_token_on_the_host(monkeypatch):
    model, tokens = build("dense"), jnp.array([[3, 5]])
    _, cache = nnx.jit(lambda model: model.with_cache(tokens, model.init_cache(1, 4)))(model)
    monkeypatch.setattr(decoder, "check_ids", lambda *_: pytest.fail("waits for the tokens"))
    assert np.isfinite(model.with_cache(tokens[:, :1], cache)[0]).all()


def test_an_id_outside_the_vocabulary_moves_no_embedding():
    embedding = lambda model, tokens: jnp.nansum(model.embedded(tokens))
    gradient = nnx.jit(nnx.grad(embedding))(build("dense"), jnp.array([[3, -1, 40, 7]])).embed.embedding[...]
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(gradient).any(axis=1)), [3, 7])
