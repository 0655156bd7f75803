"""Known bits equal those of a loop over all tokens, divided by parameters counted by hand."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.data.sources import biographies as biographies_module
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation import knowledge
from memjax.evaluation.knowledge import format_knowledge_report, knowledge_report
from memjax.models.decoder import Decoder
from memjax.models.parts import split_decoder

# 28 days, 12 months, 60 years; cities, universities, majors, employers.
CHOICES = {"birth_date": 20160, "birth_city": 100, "university": 100, "major": 50, "employer": 100}
VOCAB = 300
"""41 more than the bytes and special tokens."""


@functools.cache
def tiny(memory: bool = True) -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        vocab_size=VOCAB,
        dtype="float32",
        memory=MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
    )
    return drawn(config, std=0.25)


forward = nnx.jit(lambda model, tokens: model(tokens))


def nats(model: Decoder, prompt: str, value: str) -> float:
    """Sums the loss in nats of the value's tokens after the prompt; texts begin with token 1."""
    tokenizer = ByteTokenizer()
    before, wanted = [1, *tokenizer.encode(prompt)], tokenizer.encode(value)
    ids = before + wanted
    logits = np.asarray(forward(model, jnp.asarray([ids + [0] * (112 - len(ids))]))[0], np.float64)
    total = 0.0
    for place, token in enumerate(wanted, len(before)):
        scores = logits[place - 1]
        total += math.log(np.exp(scores).sum()) - scores[token]
    return total


@pytest.mark.parametrize(("form", "end"), [("fact", ""), ("biography", ".")])
def test_bits_are_those_of_a_loop_over_all_tokens(monkeypatch, form, end):
    # Every wording instead of a sample of them, so that the result is exact.
    monkeypatch.setattr(knowledge, "_RENDERINGS", 5)
    biographies = BiographiesConfig(num_people=3, form=form)
    report = knowledge_report(tiny(), ByteTokenizer(), DataConfig(biographies=biographies), batch_size=32)
    known = {}
    for attribute, choices in CHOICES.items():
        needed = [
            nats(tiny(), wording.format(name=person.name), f" {person.value(attribute)}{end}") / math.log(2)
            for person in biographies_module.people(biographies)
            for wording in biographies_module.STATEMENTS[attribute]
        ]
        assert len(needed) == 15
        known[attribute] = math.log2(choices) - sum(needed) / 15
        found = report["by_attribute"][attribute]
        assert found["bits"] == pytest.approx(known[attribute], rel=1e-4)
        assert found["bits_to_know"] == pytest.approx(math.log2(choices))
    assert report["bits"] == pytest.approx(3 * sum(known.values()), rel=1e-4)
    assert report["bits_to_know"] == pytest.approx(3 * math.log2(28 * 12 * 60 * 100 * 100 * 50 * 100))
    assert json.loads(json.dumps(report)) == report


def without_a_model(monkeypatch, bits_per_value: float) -> None:
    """Replaces the model's losses by a fixed number of bits for every value."""
    cost = bits_per_value * math.log(2)
    monkeypatch.setattr(knowledge, "_losses", lambda model, tokenizer, statements, *_: [cost] * len(statements))


def test_a_model_that_is_never_surprised_knows_all_there_is(monkeypatch):
    without_a_model(monkeypatch, 0.0)
    data = DataConfig(biographies=BiographiesConfig(num_people=10))
    report = knowledge_report(tiny(), ByteTokenizer(), data)
    _, params, tables = split_decoder(tiny())
    arrays = [int(leaf.size) for leaf in jax.tree.leaves(params)]
    rows = sum(leaf.size for leaf in jax.tree.leaves(tables))
    # 41 rows of the embedding and of the output matrix have no token.
    assert report["parameters"] == sum(arrays) + rows - 41 * 16 * 2
    assert report["table_parameters"] == rows == 64 * 16
    assert report["bits"] == pytest.approx(report["bits_to_know"]) == pytest.approx(10 * 39.87445, abs=1e-2)
    assert report["bits_per_parameter"] == report["bits"] / report["parameters"]
    assert report["bits_per_table_parameter"] == report["bits"] / 1024
    text = format_knowledge_report(report)
    assert "399 of 399 (100.0%); 10 people" in text
    assert "0.3894 (1,024 in the tables)" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_sample_of_people_represents_all(monkeypatch):
    without_a_model(monkeypatch, 2.0)
    data = DataConfig(biographies=BiographiesConfig(num_people=10))
    report = knowledge_report(tiny(), ByteTokenizer(), data, limit_people=3)
    assert (report["people"], report["people_measured"]) == (10, 3)
    assert report["bits"] == pytest.approx(report["bits_to_know"] - 10 * 5 * 2.0)
    assert "10 people, measured on 3" in format_knowledge_report(report)


def test_worse_than_uniform_is_below_zero_and_reported(monkeypatch):
    without_a_model(monkeypatch, 20.0)
    data = DataConfig(biographies=BiographiesConfig(num_people=1))
    report = knowledge_report(tiny(), ByteTokenizer(), data)
    assert report["bits"] == pytest.approx(39.87445 - 100, abs=1e-2)
    assert "-60 of 40, worse than a uniform guess" in format_knowledge_report(report)


def test_without_tables_there_are_no_bits_per_table_parameter(monkeypatch):
    without_a_model(monkeypatch, 0.0)
    report = knowledge_report(tiny(False), ByteTokenizer(), DataConfig(biographies=BiographiesConfig(num_people=1)))
    assert report["bits_per_table_parameter"] is None
    assert "table" not in format_knowledge_report(report)
