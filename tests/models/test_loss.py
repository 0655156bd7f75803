import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config.model import ModelConfig
from memjax.models.loss import _cross_entropy, summed_loss, token_losses
from memjax.models.parts import DecoderParts

DIM, VOCAB, BATCH = 16, 96, 2


def build(tie_embeddings=False, length=7):
    sizes = {"dim": DIM, "num_layers": 1, "num_heads": 2, "ffn_dim": 8, "vocab_size": VOCAB, "memory": None}
    config = ModelConfig(tie_embeddings=tie_embeddings, **sizes)
    parts, rng = DecoderParts.of(config), np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * DIM**-0.5, leaf.dtype)

    model = parts.merge(jax.tree.map(draw, parts.abstract_params), {})
    hidden = jnp.asarray(rng.normal(size=(BATCH, length, DIM)), jnp.float32)
    targets = jnp.asarray(rng.integers(VOCAB, size=(BATCH, length)), jnp.int32)
    mask = jnp.asarray(rng.integers(2, size=(BATCH, length)), jnp.float32)
    return model, hidden, targets, mask


def by_hand(model, hidden, targets):
    kernel = model.embed.embedding[...].T if model.head is None else model.head.kernel[...]
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    losses = np.zeros(targets.shape)
    for place in np.ndindex(targets.shape):
        losses[place] = np.log(np.sum(np.exp(logits[place]))) - logits[(*place, targets[place])]
    return losses


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 6, 4096], ids=lambda tokens: f"chunks of {tokens} tokens")
def test_losses_are_minus_log_probabilities_however_they_are_cut(chunk_tokens, tie_embeddings):
    cut = {"logit_bytes": chunk_tokens * VOCAB * 4}
    model, hidden, targets, mask = build(tie_embeddings)
    expected = by_hand(model, hidden, np.asarray(targets))
    np.testing.assert_allclose(nnx.jit(partial(token_losses, **cut))(model, hidden, targets), expected, rtol=1e-5)
    total, losses = nnx.jit(partial(summed_loss, **cut))(model, hidden, targets, mask)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(total, np.sum(expected * np.asarray(mask)), rtol=1e-5)


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_targets_outside_the_vocabulary_are_refused_and_nan_where_they_are_traced(target):
    model, hidden, targets, mask = build()
    wrong = targets.at[0, 2].set(target)
    for loss in (token_losses, partial(summed_loss, weights=mask)):
        with pytest.raises(ValueError, match=f"targets hold {target}; the model knows 0..{VOCAB - 1}"):
            loss(model, hidden, wrong)
    losses = nnx.jit(token_losses)(model, hidden, wrong)
    np.testing.assert_array_equal(jnp.isnan(losses), wrong == target)


def test_targets_outside_the_vocabulary_count_nothing_where_their_weight_is_0():
    model, hidden, targets, mask = build()
    masked = mask.at[0, 2].set(0.0)
    expected = summed_loss(model, hidden, targets, masked)[0]
    for target in (-100, VOCAB):
        given = hidden, targets.at[0, 2].set(target), masked
        for loss in (summed_loss, nnx.jit(summed_loss)):
            np.testing.assert_allclose(loss(model, *given)[0], expected, rtol=1e-6)


def test_each_token_needs_a_target_and_a_weight(as_users_call):
    model, hidden, targets, mask = build()
    wrong: Any
    for wrong in ((targets[:1], mask), (targets[:, :1], mask), (targets, mask[:, 1:]), (targets.tolist(), mask)):
        with pytest.raises(ValueError, match="loss: each token needs one of each"):
            summed_loss(model, hidden, *wrong)
    with jax.numpy_dtype_promotion("strict"):
        loss, _ = summed_loss(model, hidden, targets, mask.astype(bool))
    np.testing.assert_allclose(loss, summed_loss(model, hidden, targets, mask)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32"])
def test_no_type_of_targets_hides_one_that_is_wrong(as_users_call, dtype):
    wrong = 2**32 - 1 if dtype == "uint32" else -1
    logits, targets = jnp.zeros((1, 2, 259 if dtype == "int8" else 40_000)), jnp.asarray(np.array([[wrong, 3]], dtype))
    losses = jax.jit(lambda *given: _cross_entropy(*given)[0])(logits, targets)
    np.testing.assert_array_equal(jnp.isnan(losses), [[True, False]])


def gradients(model, hidden, targets, mask, *, chunk_tokens):
    graphdef, params = nnx.split(model)

    def loss(params, hidden):
        return summed_loss(nnx.merge(graphdef, params), hidden, targets, mask, logit_bytes=chunk_tokens * VOCAB * 4)[0]

    return jax.jit(jax.grad(loss, argnums=(0, 1))), params, hidden


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_gradients_are_softmax_minus_target_however_they_are_cut(tie_embeddings):
    model, hidden, targets, mask = build(tie_embeddings)
    kernel = np.asarray(model.embed.embedding[...].T if model.head is None else model.head.kernel[...], np.float64)
    logits = np.asarray(hidden, np.float64) @ kernel
    d_logits = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(VOCAB)[np.asarray(targets)]
    d_logits *= np.asarray(mask)[..., None]
    for chunk_tokens in (6, 4096):
        compiled, *arguments = gradients(model, hidden, targets, mask, chunk_tokens=chunk_tokens)
        d_params, d_hidden = compiled(*arguments)
        np.testing.assert_allclose(d_hidden, d_logits @ kernel.T, rtol=1e-4, atol=1e-5)
        d_kernel = d_params["embed"]["embedding"][...].T if tie_embeddings else d_params["head"]["kernel"][...]
        expected = np.einsum("bsd,bsv->dv", np.asarray(hidden, np.float64), d_logits)
        np.testing.assert_allclose(d_kernel, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("chunk_tokens", [6, 4096])
def test_gradients_of_bfloat16_run_on_this_device(tie_embeddings, chunk_tokens):
    model, hidden, targets, mask = build(tie_embeddings)
    arguments = targets, mask
    wide, *given = gradients(model, hidden, *arguments, chunk_tokens=chunk_tokens)
    narrow, *_ = gradients(model, hidden.astype(jnp.bfloat16), *arguments, chunk_tokens=chunk_tokens)
    expected, found = (
        compiled(given[0], x)[0] for compiled, x in ((wide, hidden), (narrow, hidden.astype("bfloat16")))
    )
    # Sums of at most 14 products of factors rounded to 8 bits.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.03), expected, found)


def test_compiled_gradient_holds_no_float32_array_of_tokens_by_vocabulary():
    length = 64

    def largest(chunk_tokens):
        compiled, *arguments = gradients(*build(length=length), chunk_tokens=chunk_tokens)
        text = str(compiled.lower(*arguments).compile().as_text())
        return max(np.prod([int(size) for size in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(4096) >= BATCH * length * VOCAB
    assert largest(16) < BATCH * length * VOCAB
