"""A trace's effect of a slot equals what the logits lose without that slot."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.knowledge import trace as trace_module
from memjax.knowledge.trace import trace
from memjax.models.parts import split_decoder, writable

PROMPT, ANSWER = [1, 70, 9, 200, 33, 8], [120, 7]
KINDS = ["memory_plus", "plain", "gated_beside", "peer"]


def final_stream(model, tokens) -> np.ndarray:
    """The residual stream before the final norm, obtained by replacing that norm by the identity."""
    parts, params, tables = split_decoder(model)
    copy = parts.merge(params, tables)
    setattr(copy, "norm", _Nothing())  # noqa: B010  another type than the class declares
    return np.asarray(nnx.jit(lambda m, t: m.hidden(t).states)(copy, jnp.asarray([tokens]))[0], np.float64)


class _Nothing(nnx.Module):
    def __call__(self, x):
        return types.SimpleNamespace(normed=x)


def with_table(model, name, table):
    parts, params, tables = split_decoder(model)
    return parts.merge(params, {**tables, name: table})


@pytest.mark.parametrize("kind", [*KINDS, "post_norms"])
def test_slots_add_up_to_the_output_of_their_layer(model_of, kind):
    found = trace(model_of(kind), PROMPT, ANSWER)
    assert set(found.layers) == {"L0", "L2"}
    for layer in found.layers.values():
        np.testing.assert_allclose(layer.added.sum(axis=1) + layer.rest, layer.total, rtol=1e-4, atol=1e-5)
        assert np.abs(layer.total).max() > 1e-3
        np.testing.assert_allclose(layer.rest == 0, kind in ("plain", "peer"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_of_the_last_layer_adds_what_the_logit_loses_without_it(model_of, kind):
    model = model_of(kind)
    found = trace(model, PROMPT, ANSWER)
    name = "experts_2_outputs" if kind == "peer" else "layer_2"
    table = writable(split_decoder(model)[2])[name]
    before = final_stream(model, found.tokens)
    scale = 1 / np.sqrt((before**2).mean(axis=1) + model.norm.epsilon)
    to_logits = np.asarray(model.norm.scale[...])[:, None] * np.asarray(model.output_matrix())
    slots = found.layers["L2"].slots
    slot = int(slots[2, 1])
    lost = before - final_stream(with_table(model, name, table.at[slot].set(0)), found.tokens)
    for place, target in enumerate(found.targets):
        added = found.layers["L2"].added[place][slots[place] == slot].sum()
        np.testing.assert_allclose(added, scale[place] * lost[place] @ to_logits[:, target], rtol=2e-3, atol=2e-5)


def test_what_a_layer_gives_is_traced_through_the_norm_of_its_output(model_of):
    parts, params, tables = split_decoder(model_of("post_norms"))
    model = parts.merge(params, tables)
    found = trace(model, PROMPT, ANSWER)
    before = final_stream(model, found.tokens)
    silent = parts.merge(jax.tree.map(jnp.copy, params), tables)
    silent.blocks[2].mixer_norm.scale[...] *= 0
    given = before - final_stream(silent, found.tokens)
    scale = np.asarray(model.norm.scale[...]) / np.sqrt((before**2).mean(axis=1, keepdims=True) + model.norm.epsilon)
    columns = np.asarray(model.output_matrix())[:, found.targets].T
    np.testing.assert_allclose(found.layers["L2"].total, (given * scale * columns).sum(axis=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "post_norms"])
def test_effects_are_derivatives_of_the_answers_logit(model_of, kind):
    model = model_of(kind)
    found = trace(model, PROMPT, ANSWER)
    name = "experts_0_outputs" if kind == "peer" else "layer_0"
    table, layer = writable(split_decoder(model)[2])[name], found.layers["L0"]
    step = 3e-3
    logit = nnx.jit(lambda m: m(jnp.asarray([PROMPT]))[0, -1, ANSWER[0]])
    slot = int(layer.slots[len(PROMPT) - 1, 0])
    up, down = (float(logit(with_table(model, name, table.at[slot].multiply(1 + sign * step)))) for sign in (1, -1))
    expected = (up - down) / (2 * step)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(layer.effect[layer.slots == slot].sum(), expected, rtol=0.05, atol=1e-3)


def test_logits_and_probabilities_are_the_models(model_of):
    model = model_of("memory_plus")
    found = trace(model, PROMPT, ANSWER, guesses=3)
    assert found.tokens == [*PROMPT, ANSWER[0]]
    assert found.targets == [*PROMPT[1:], *ANSWER]
    assert found.place == len(PROMPT) - 1
    logits = np.asarray(model(jnp.asarray([found.tokens])))[0]
    places = np.arange(len(found.tokens))
    np.testing.assert_allclose(found.logits, logits[places, found.targets], rtol=1e-4, atol=1e-5)
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    np.testing.assert_allclose(found.probabilities, probabilities[places, found.targets], rtol=1e-4)
    best = np.argsort(-probabilities, axis=1)[:, :3]
    assert [[token for token, _ in guesses] for guesses in found.guesses] == best.tolist()
    assert trace(model, PROMPT).targets == [*PROMPT[1:], int(logits[len(PROMPT) - 1].argmax())]


@pytest.mark.parametrize(("prompt", "answer"), [([1, 259], [7]), ([1, 70], [259])])
def test_an_id_outside_the_vocabulary_is_not_traced(model_of, prompt, answer):
    with pytest.raises(ValueError, match=r"hold 259; the model knows 0\.\.258"):
        trace(model_of("plain"), prompt, answer)


def test_a_second_prompt_compiles_nothing(model_of):
    model, programs = model_of("plain"), [getattr(trace_module, name) for name in ("_traced", "_effects")]
    trace(model, PROMPT, ANSWER)
    before = [program._cache_size() for program in programs]
    trace(model, [*PROMPT, 5], ANSWER[:1])
    assert [program._cache_size() for program in programs] == before
