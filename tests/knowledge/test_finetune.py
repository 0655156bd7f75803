"""Only rows that a batch reads more than the background does are trained, and they learn the facts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from drawn import drawn
from memjax.data.sources.records import Segment
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.knowledge.facts import Fact, pairs_of
from memjax.knowledge.finetune import Recipe, _Batches, chosen, learn, scores
from memjax.knowledge.reads import slot_reads
from memjax.knowledge.slots import Background, count_texts, slot_report
from memjax.models.parts import split_decoder, writable
from memjax.sharding.mesh import by_columns, replicated
from memjax.sharding.rules import COLUMNS

TOKENIZER = ByteTokenizer()
FACTS = [
    Fact(((Segment(prompt, False), Segment(answer, True)),))
    for prompt, answer in [("ab?", " x"), ("cd?", " y"), ("ba?", " z")]
]
TEXTS = [(Segment(text, True),) for text in ("abcd", "dcba", "abba", "a", "xyz xyz")]


def test_scores_are_the_share_of_the_reads_times_the_rarity_of_the_slot():
    reads, background = np.array([6, 3, 1, 0, 2]), np.array([9, 4, 0, 0, 1])
    expected = reads / 12 * np.log(10 / (background + 1))
    np.testing.assert_allclose(scores(jnp.asarray(reads), jnp.asarray(background), 9), expected, rtol=1e-6)
    for rows in range(1, 7):
        # Every text reads the first, and none reads the fourth.
        best = sorted(set(np.argsort(-expected)[:rows].tolist()) - {0, 3})
        found = np.flatnonzero(chosen(jnp.asarray(reads), jnp.asarray(background), 9, rows))
        assert found.tolist() == best


indices_of = nnx.jit(
    lambda model, tokens: {name: read.indices for name, read in slot_reads(model.hidden(tokens)).items()}
)


def picks_of(model, text: str) -> dict[str, np.ndarray]:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    # Attention is causal, so padding changes nothing, and one program serves texts of all lengths.
    padded = jnp.asarray([ids + [0] * (16 - len(ids))])
    return {name: np.asarray(indices)[: len(ids)] for name, indices in indices_of(model, padded).items()}


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
def test_texts_that_read_a_slot_are_counted_once_each(model_of, kind):
    model = model_of(kind)
    found = count_texts(model, TOKENIZER, TEXTS, length=8, batch_size=2)
    assert found.texts == len(TEXTS)
    for table, layer in {"memory_plus": [("layer_0", "L0"), ("layer_2", "L2")], "peer": [("experts_2_outputs", "L2")]}[
        kind
    ]:
        expected = np.zeros(36, int)
        for record in TEXTS:
            expected[np.unique(picks_of(model, record[0].text)[layer])] += 1
        np.testing.assert_array_equal(found.counts[table], expected)


def test_contexts_of_a_slot_are_those_that_read_it(model_of):
    model = model_of("plain")
    picks = picks_of(model, "abcd")["L2"]
    slot = int(picks[3, 0])
    report = slot_report(model, TOKENIZER, TEXTS, "L2", slot, length=8, batch_size=2, contexts=50, promoted=4)
    reads = sum((picks_of(model, record[0].text)["L2"] == slot).any(axis=1).sum() for record in TEXTS)
    assert report.reads == len(report.contexts) == reads
    assert (TOKENIZER.bos_id, *TOKENIZER.encode("abc")) in [context.tokens for context in report.contexts]
    weights = [abs(context.weight) for context in report.contexts]
    assert weights == sorted(weights, reverse=True)
    row = np.asarray(split_decoder(model)[2]["layer_2"])[slot]
    # A plain layer of the model's width adds the row itself, so up to its sign the ranking of logits is fixed.
    gains = row * np.asarray(model.norm.scale[...]) @ np.asarray(model.output_matrix())
    signs = {np.sign(context.weight) for context in report.contexts}
    assert signs == {1.0}
    assert report.promoted[0][0] == int(gains.argmax())


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
def test_facts_are_learned_in_few_rows_and_nothing_else_changes(model_of, kind):
    model = model_of(kind)
    _, params, tables = split_decoder(model)
    before = jax.tree.map(np.asarray, tables)
    background = count_texts(model, TOKENIZER, TEXTS, length=8, batch_size=5)
    losses = []
    recipe = Recipe(rows=3, lr=0.3, epochs=6, batch_size=3, replay=0)
    learned = learn(
        model,
        TOKENIZER,
        FACTS,
        background,
        recipe,
        longest=16,
        after_epoch=lambda _, loss, __: bool(losses.append(loss)),
    )
    assert losses[-1] < losses[0]
    _, new_params, new_tables = split_decoder(learned)
    jax.tree.map(np.testing.assert_array_equal, params, new_params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, split_decoder(model)[2]))
    changed = {name: np.flatnonzero((before[name] != np.asarray(new_tables[name])).any(axis=1)) for name in before}
    assert all(0 < len(rows) <= 3 * recipe.epochs for rows in changed.values())
    if kind == "peer":
        np.testing.assert_array_equal(changed["experts_2_inputs"], changed["experts_2_outputs"])
    else:
        # No changed row affects the first layer's reads, so it trains the same three rows in every epoch.
        assert len(changed["layer_0"]) == 3


def test_only_tokens_that_are_not_known_count_and_the_fewer_the_more(model_of):
    model, leads, nats = model_of("memory_plus"), [], []
    for ((prompt, answer),) in (fact.wordings for fact in FACTS):
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt.text + answer.text), TOKENIZER.eos_id]
        logits = np.asarray(model(jnp.asarray([ids[:-1]])), np.float64)[0]
        for place in range(len(prompt.text), len(ids) - 1):
            target = logits[place, ids[place + 1]]
            leads.append(target - np.delete(logits[place], ids[place + 1]).max())
            nats.append(np.log(np.exp(logits[place]).sum()) - target)
    # A rate this small changes nothing, so all four steps see the same model.
    recipe = Recipe(rows=3, lr=1e-12, epochs=4, batch_size=3, optimizer="sgd")
    background = Background(5, {name: np.zeros(36, np.int32) for name in ("layer_0", "layer_2")})
    for unknown in (0, 1, 4, len(leads)):
        margin = np.mean([-99, *np.sort(leads), 99][unknown : unknown + 2])
        losses = []
        learn(
            model,
            TOKENIZER,
            FACTS,
            background,
            dataclasses.replace(recipe, margin=float(margin)),
            longest=16,
            after_epoch=lambda _, loss, __, losses=losses: bool(losses.append(loss)),
        )
        least = np.array(nats)[np.argsort(leads)[:unknown]].sum() / len(leads)
        most = [min(len(leads) / max(unknown, 1), 1 + 32 * step / 4) for step in range(4)]
        np.testing.assert_allclose(losses, least * np.array(most), rtol=1e-5)


@pytest.mark.parametrize(("optimizer", "width", "lr"), [("sgd", 12, 30.0), ("rowwise_adam", 512, 0.03)])
def test_tables_that_devices_share_by_columns_learn_the_same_rows(model_of, optimizer, width, lr, caplog):
    # At most 256 columns share a second moment, so 512 columns are grouped alike on one and on two devices.
    config = model_of("memory_plus").config
    assert config.memory is not None
    model = drawn(dataclasses.replace(config, memory=dataclasses.replace(config.memory, value_dim=width)))
    recipe = Recipe(rows=3, lr=lr, epochs=2, batch_size=3, optimizer=optimizer)
    background = count_texts(model, TOKENIZER, TEXTS, length=8, batch_size=5)
    expected = learn(model, TOKENIZER, FACTS, background, recipe, longest=16)
    automatic, axes = jax.sharding.AxisType.Auto, ("data", "memory")
    mesh = jax.make_mesh((1, 2), axes, axis_types=(automatic, automatic), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level("WARNING"):
        parts, params, tables = split_decoder(model)
        split = jax.device_put((params, tables), (replicated(mesh, params), by_columns(mesh, tables)))
        learned = learn(parts.merge(*split), TOKENIZER, FACTS, background, recipe, longest=16)
    assert caplog.text.count("Compiling jit(_step)") == 1
    of_one = writable(split_decoder(expected)[2])
    for name, table in writable(split_decoder(learned)[2]).items():
        assert table.sharding == NamedSharding(mesh, COLUMNS)
        np.testing.assert_allclose(table, of_one[name], rtol=1e-5, atol=1e-6)


def test_the_step_is_compiled_once_for_a_model_committed_to_a_device(model_of, caplog):
    parts, params, tables = split_decoder(model_of("memory_plus"))
    model = parts.merge(*jax.device_put((params, tables), jax.devices()[0]))  # committed, like a loaded model
    recipe = Recipe(rows=3, lr=0.3, epochs=3, batch_size=3, replay=0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        background = count_texts(model, TOKENIZER, TEXTS, length=8, batch_size=2)
        learn(model, TOKENIZER, FACTS, background, recipe, longest=16)
    assert caplog.text.count("Compiling jit(_add_texts)") == 1
    assert caplog.text.count("Compiling jit(_step)") == 1


def test_a_second_learning_compiles_no_step(model_of, caplog):
    model, recipe = model_of("memory_plus"), Recipe(rows=3, lr=0.3, epochs=1, batch_size=3)
    background = count_texts(model, TOKENIZER, TEXTS, length=8, batch_size=5)
    learned = learn(model, TOKENIZER, FACTS, background, recipe, longest=16)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        learn(learned, TOKENIZER, FACTS[::-1], background, recipe, longest=16)
    assert "jit(_step)" not in caplog.text


def test_slots_that_every_text_reads_are_left_alone(model_of):
    model = model_of("memory_plus")
    counts = {name: np.full(36, 4, np.int32) for name in ("layer_0", "layer_2")}
    recipe = Recipe(rows=3, lr=0.3, epochs=1, batch_size=3)
    learned = learn(model, TOKENIZER, FACTS, Background(4, counts), recipe, longest=16)
    jax.tree.map(np.testing.assert_array_equal, split_decoder(model)[2], split_decoder(learned)[2])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model_of, monkeypatch):
    model = model_of("peer")
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
    for run in (
        lambda: count_texts(model, TOKENIZER, TEXTS, length=8),
        lambda: slot_report(model, TOKENIZER, TEXTS, "L2", 0, length=8),
        lambda: learn(
            model, TOKENIZER, FACTS, Background(1, {}), Recipe(rows=1, lr=0.1, epochs=1, batch_size=2), longest=8
        ),
    ):
        with pytest.raises(ValueError, match="the tokenizer has 300 tokens, the model 259: use the tokenizer"):
            run()


@pytest.mark.parametrize(("facts", "replayed"), [(1, 8), (4, 32), (16, 128), (40, 128)])
def test_texts_are_replayed_in_proportion_to_the_facts_of_a_batch(facts, replayed):
    pairs, old = (pairs_of(texts, TOKENIZER) for texts in ([FACTS[0].wordings[0]], TEXTS))
    recipe = Recipe(rows=3, lr=0.3, epochs=1, batch_size=16, replay=128)
    for batch in _Batches([pairs[:1]] * facts, old, recipe).of_epoch():
        assert batch["first_new"] == replayed
        assert replayed < len(np.unique(np.asarray(batch["segments"]))) - 1 <= replayed + 16
