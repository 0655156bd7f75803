"""Recall equals that of greedy generation, and is reported beside that of guessing."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.data.sources.biographies import Person, Question
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.evaluation.recall import fact_report, format_fact_report, majority_guess, recall, zero_tables
from memjax.inference.streaming import generate
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder, writable

NOBODY = Person(name="", birth_date="", birth_city="", university="", major="", employer="", work_city="")


class Letters(Tokenizer):
    """29 letters, all of them likely from an untrained model; the test chooses which token ends texts."""

    kind = "letters"

    def __init__(self, eos_id: int):
        super().__init__([b"", b"", b""] + [bytes([97 + i]) for i in range(29)])
        self.eos_id = eos_id  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 94 for letter in text]

    def encode_batch(self, texts) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def to_state(self) -> dict:
        return {"kind": self.kind}


forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def tiny(vocab_size: int = 259, memory: bool = True) -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        vocab_size=vocab_size,
        dtype="float32",
        memory=MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
    )
    return drawn(config)


def question(prompt: str, answer: str, attribute: str = "major") -> Question:
    return Question(prompt=prompt, answer=answer, attribute=attribute, person=NOBODY)


def test_recall_is_what_greedy_generation_answers():
    model = tiny(vocab_size=32)
    rng = np.random.default_rng(0)
    prompts = ["".join(chr(97 + letter) for letter in rng.integers(29, size=size)) for size in (2, 3, 5, 7) * 20]

    def write(text: str, count: int) -> list[int]:
        return list(generate(model, [1, *Letters(2).encode(text)], max_tokens=count))

    written = [write(prompt, 7) for prompt in prompts]

    def answer(tokens: list[int], end: int) -> list[int]:
        """The tokens before the end of text; none if it does not occur or special tokens precede it."""
        before = tokens[: tokens.index(end)] if end in tokens else []
        return before if min(before, default=0) > 2 else []

    # Choose as end of text the token that ends most greedy answers.
    tokenizer = Letters(max(range(3, 32), key=lambda end: sum(bool(answer(tokens, end)) for tokens in written)))
    questions = []
    for number, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
        right = tokenizer.decode(answer(tokens, tokenizer.eos_id)) or "abc"
        wrong = {1: right + "b", 3: chr(97 + (ord(right[0]) - 96) % 29) + right[1:], 5: right[:-1] or "ab"}
        questions.append(question(prompt, wrong.get(number % 6, right), ("major", "employer")[number % 2]))

    greedy = []
    for asked in questions:
        expected = tokenizer.encode(asked.answer)
        greedy.append(write(asked.prompt, len(expected) + 1) == [*expected, tokenizer.eos_id])
    assert 4 < sum(greedy) < len(greedy) - 4
    for batch_size in (32, 80):
        found = recall(model, tokenizer, questions, batch_size=batch_size)
        np.testing.assert_array_equal(found.correct, greedy)
        assert found.accuracy == np.mean(greedy)
        assert found.by_attribute == {"major": np.mean(greedy[::2]), "employer": np.mean(greedy[1::2])}


def test_zero_questions_are_refused():
    with pytest.raises(ValueError, match="no questions"):
        recall(tiny(), ByteTokenizer(), [])


def test_majority_guess_by_hand():
    trained = [question("", answer, attribute) for answer, attribute in
               [(" Law", "major"), (" Law", "major"), (" Art", "major"), (" Acme", "employer")]]  # fmt: skip
    asked = [question("", answer, attribute) for answer, attribute in
             [(" Law", "major"), (" Art", "major"), (" Acme", "employer"), (" Rome", "birth_city")]]  # fmt: skip
    assert majority_guess(trained, asked) == 0.5
    assert majority_guess(asked[1:], asked) == 0.75
    assert majority_guess([], asked) == 0


def test_zeroed_tables_change_what_the_model_says_and_nothing_else():
    model, tokens = nnx.clone(tiny()), jnp.asarray([[1, 5, 9, 200]])
    before = forward(model, tokens)
    zeroed = zero_tables(model)
    assert all(not table.any() for table in writable(split_decoder(zeroed)[2]).values())
    assert jax.tree.all(jax.tree.map(np.array_equal, split_decoder(zeroed)[1], split_decoder(model)[1]))
    assert np.abs(forward(zeroed, tokens) - before).max() > 0.01
    np.testing.assert_array_equal(forward(model, tokens), before)

    donated = zero_tables(model, donate=True)
    np.testing.assert_array_equal(forward(donated, tokens), forward(zeroed, tokens))
    assert all(table.is_deleted() for table in writable(split_decoder(model)[2]).values())


def test_the_report_separates_asked_and_held_out():
    data = DataConfig(biographies=BiographiesConfig(num_people=10, held_out_fraction=0.3))
    report = fact_report(tiny(), ByteTokenizer(), data, limit_people=5, batch_size=16)
    assert json.loads(json.dumps(report)) == report
    assert (report["asked"]["questions"], report["held_out"]["questions"]) == (30, 18)
    for group in report.values():
        assert 0 <= group["majority_guess"] <= 1
        assert group["accuracy"] == group["zeroed_accuracy"] == 0
        assert len(group["by_attribute"]) == len(group["zeroed_by_attribute"]) == 6
        assert len(group["samples"]) == 3
    assert report["asked"]["majority_guess"] > 0
    text = format_fact_report(report)
    for expected in ("asked in training", "seen, not asked", "tables zeroed", "commonest answer", "birth city"):
        assert expected in text
    table, _, samples = text.partition("Asked in training:")
    assert max(map(len, table.splitlines())) < 60
    assert max(map(len, samples.splitlines())) <= 120


def test_the_report_leaves_out_what_does_not_exist():
    everyone_asked = DataConfig(biographies=BiographiesConfig(num_people=2, held_out_fraction=0.0))
    report = fact_report(tiny(memory=False), ByteTokenizer(), everyone_asked, batch_size=16)
    assert set(report) == {"asked"}
    assert "zeroed_accuracy" not in report["asked"]
    assert "zeroed" not in format_fact_report(report)


def test_a_mesh_recalls_the_same_and_zeroes_its_tables_in_place(mesh):
    parts, params, tables = split_decoder(tiny(vocab_size=32))
    questions = [question("abc", "d"), question("ab", "cd")]
    alone = recall(parts.merge(params, tables), Letters(2), questions, batch_size=8)
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "memory"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        spread = parts.merge(jax.device_put(params, whole), jax.device_put(tables, columns))
        found = recall(spread, Letters(2), questions, batch_size=8)
        zeroed = writable(split_decoder(zero_tables(spread, donate=True))[2])["shared"]
    np.testing.assert_array_equal(found.correct, alone.correct)
    assert zeroed.sharding == columns
    assert not np.asarray(zeroed).any()
