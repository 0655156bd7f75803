"""Prepared weights compute the same numbers as the model, and need memory only for joined matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.memory import MemoryConfig
from memjax.config.model import ExpertsConfig, ModelConfig
from memjax.inference import weights
from memjax.inference.weights import JoinedAttention, prepare
from memjax.models.decoder import Decoder
from memjax.ops import dispatch

TOKENS = jnp.array([[1, 5, 9, 3, 7, 2], [1, 8, 8, 4, 6, 5]], jnp.int32)


def tiny(**settings) -> Decoder:
    config = ModelConfig(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=40, **settings)
    return drawn(config)


def kinds():
    memory = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, key_dim=8)
    return {
        "memory": {"memory": memory, "attention_bias": True},
        "post-norms": {"memory": memory, "norm_placement": "post", "qk_norm": "all_heads"},
        "experts": {
            "memory": None,
            "experts": ExpertsConfig(layers=(1,), num_experts=4, top_k=2),
            "tie_embeddings": True,
        },
    }


@nnx.jit
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.logits(model.hidden_with_cache(tokens, None)[0])


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_logits_are_those_of_the_model(kind, dtype, tolerance):
    model = tiny(dtype=dtype, **kinds()[kind])
    expected = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    found = logits_of(prepare(model).model, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * float(jnp.abs(expected).max()))


def test_joined_layers_serve_the_whole_forward_pass_too():
    model = tiny(dtype="float32", **kinds()["memory"])
    expected, found = (
        nnx.jit(lambda model, tokens: model(tokens))(one, TOKENS) for one in (model, prepare(model).model)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_tables_and_vectors_stay_the_models_own_and_matrices_are_narrowed():
    model = tiny(dtype="bfloat16", **kinds()["memory"])
    ready = prepare(model).model
    assert ready.tables["shared"].rows[...] is model.tables["shared"].rows[...]
    assert ready.norm.scale[...] is model.norm.scale[...]
    attention = ready.blocks[0].attention
    assert isinstance(attention, JoinedAttention)
    assert ready.embed.embedding.dtype == attention.joined.rows.dtype == jnp.bfloat16
    assert attention.joined.rows.shape == (16 + 8 + 8, 16)
    # The model is unchanged.
    assert model.embed.embedding.dtype == model.blocks[0].attention.query.kernel.dtype == jnp.float32


def test_weights_are_prepared_once_and_again_after_a_change_of_the_model():
    model = tiny(dtype="float32", **kinds()["memory"])
    ready = prepare(model).model
    assert prepare(model).model is ready
    model.norm.scale[...] = model.norm.scale[...] * 2
    assert prepare(model).model is not ready
    np.testing.assert_allclose(prepare(model).model.norm.scale[...], ready.norm.scale[...] * 2)


@pytest.mark.parametrize("kind", kinds())
def test_a_single_row_is_multiplied_by_the_kernel_as_well(kind, monkeypatch):
    if reason := dispatch.why_not("triton"):
        pytest.skip(reason)
    ready = prepare(tiny(dtype="float32", **kinds()[kind])).model
    expected = ready.logits(ready.hidden_with_cache(TOKENS[:1, :1], None)[0])
    rows: list[int] = []

    def is_for_kernel(x: jax.Array) -> bool:
        rows.append(x.size // x.shape[-1])
        return rows[-1] == 1

    monkeypatch.setattr(weights, "_is_for_kernel", is_for_kernel)
    found = ready.logits(ready.hidden_with_cache(TOKENS[:1, :1], None)[0])
    assert rows.count(1) >= 3 * 3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
