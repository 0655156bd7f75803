"""Prompts that share a prefix with others read only the rest, and get the same text as alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn import drawn
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig, RopeScalingConfig
from memjax.config.sampling import SamplingConfig
from memjax.inference import engine as engine_module
from memjax.inference.engine import Engine
from memjax.inference.prefixes import Prompts
from memjax.inference.programs import padded_length
from memjax.inference.requests import Request
from memjax.inference.serving_engine import ServingEngine
from memjax.inference.streaming import generate
from memjax.models.decoder import Decoder

CAPACITY = 128


def tiny(**settings: Any) -> Decoder:
    memory = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, key_dim=8)
    config = ModelConfig(dim=16, num_layers=2, num_heads=4, ffn_dim=32, vocab_size=259, dtype="float32", memory=memory)
    return drawn(dataclasses.replace(config, **settings))


def shared(one: list[int], other: list[int]) -> int:
    """The length of the common prefix of two prompts, at most all but the last token of the first."""
    count = 0
    while count < min(len(one) - 1, len(other)) and one[count] == other[count]:
        count += 1
    return count


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=40).map(lambda bits: np.repeat(bits, 7).tolist())


@given(st.lists(st.tuples(st.integers(0, 2), prompts), max_size=8), prompts)
def test_the_longest_beginning_is_found_where_it_saves_padding(puts, prompt):
    held, rows, order = Prompts(3, 256), {}, [0, 1, 2]
    held.is_used = True
    for row, other in puts:
        held.put(row, other)
        rows[row] = other if len(other) <= 256 else []
        order.remove(row)
        order.append(row)
    assert held.by_age([0, 1, 2]) == order
    found = held.joining(Request(prompt_ids=prompt, max_tokens=1), 7)
    most = max((shared(prompt, other) for other in rows.values()), default=0)
    # On CPUs whole prompts are padded to 16, 32, 64, ..., what is left of one to 16 or 64, and copies to 64 or 256.
    padded = lambda count, sizes: next((size for size in sizes if size >= count), 999)
    whole, rest = padded(len(prompt), (16, 32, 64, 128, 256)), padded(len(prompt) - most, (16, 64))
    saves = len(prompt) <= 256 and rest < whole
    assert (found.slot, found.start, found.width) == (
        7,
        most if saves else 0,
        rest if saves else padded_length(len(prompt)),
    )
    assert found.size == (padded(len(prompt), (64, 256)) if saves else 0)
    assert not saves or shared(prompt, rows[found.source]) == most
    held.clear()
    assert held.joining(Request(prompt_ids=prompt, max_tokens=1), 7).start == 0


def test_texts_are_those_of_prompts_that_were_read_whole():
    model, rng = tiny(sliding_window=50), np.random.default_rng(0)
    engine = ServingEngine(model, num_slots=3, max_length=CAPACITY)
    stem = [1, *rng.integers(3, 259, size=80).tolist()]
    num_reused = 0
    for _ in range(8):
        requests = []
        for number in range(rng.integers(1, 4)):
            tail = rng.integers(3, 259, size=rng.integers(1, 20)).tolist()
            drawn_from = SamplingConfig(temperature=1.0, seed=3, repetition_penalty=1.5)
            sampling = drawn_from if rng.random() < 0.5 else SamplingConfig(repetition_penalty=3.0)
            prompt = stem[: rng.integers(1, len(stem))] + tail
            requests.append(Request(prompt_ids=prompt, max_tokens=8, sampling=sampling, number=number))
        texts: dict[int, list[int]] = {slot: [] for slot in engine.insert(requests)}
        while engine.is_busy:
            for slot, made in engine.step(8).items():
                texts[slot] += made.tokens
                num_reused += made.num_reused
        for request, text in zip(requests, texts.values(), strict=True):
            ids, sampling = request.prompt_ids, request.sampling
            assert text == list(generate(model, ids, max_tokens=8, sampling=sampling, number=request.number))
    assert num_reused > 200


def reused(engine: Engine, *prompts: list[int]) -> list[int]:
    """The number of reused tokens of each of several prompts that arrive together."""
    slots = engine.insert([Request(prompt_ids=ids, max_tokens=2) for ids in prompts])
    found = dict.fromkeys(slots, 0)
    while engine.is_busy:
        for slot, made in engine.step(2).items():
            found[slot] += made.num_reused
    return list(found.values())


def test_the_oldest_prompts_are_overwritten_first_and_a_reset_forgets_all():
    engine = ServingEngine(tiny(), num_slots=2, max_length=CAPACITY)
    one, two = [1, *[7] * 60], [1, *[8] * 60]
    assert [reused(engine, one), reused(engine, two)] == [[0], [0]]
    # Each goes where the other was, before which it is copied.
    assert [reused(engine, [*one, 9]), reused(engine, [*two, 9, 9])] == [[61], [61]]
    assert reused(engine, [*two, 9, 9], one) == [62, 60]
    engine.reset()
    assert reused(engine, one, one) == [0, 0]
    assert reused(engine, [5] * 60, one) == [0, 60]
    assert reused(ServingEngine(tiny(), num_slots=2, max_length=CAPACITY, reuse_prompts=False), one, one) == [0, 0]


def test_copies_take_no_more_memory_at_once_than_prompts_that_are_read(monkeypatch):
    engine = ServingEngine(tiny(), num_slots=4, max_length=CAPACITY)
    monkeypatch.setattr(engine_module, "_PREFILL_TOKENS", 2 * CAPACITY)
    engine.insert([Request(prompt_ids=[5] * 100, max_tokens=1)])
    engine.step(1)
    engine.insert([Request(prompt_ids=[5] * size, max_tokens=1) for size in (101, 102, 103)], prefill_rows=4)
    assert [fresh.state.cache.blocks[0].keys.shape[::2] for fresh in engine._unread] == [(2, CAPACITY)] * 2
    assert [slot.num_reused for fresh in engine._unread for slot in fresh.slots.values()] == [100] * 3


def test_nothing_is_reused_where_it_would_change_a_text(mesh):
    scaling = RopeScalingConfig(kind="dynamic", factor=4.0, original_length=16)
    engine = ServingEngine(tiny(rope_scaling=scaling), num_slots=2, max_length=CAPACITY)
    assert [reused(engine, [5] * 60) for _ in range(2)] == [[0], [0]]
    with jax.set_mesh(mesh):
        assert not ServingEngine(tiny(), num_slots=2, max_length=CAPACITY).reuses_prompts


@pytest.mark.parametrize("length", [CAPACITY, CAPACITY + 1])
def test_prompts_that_fill_the_cache_or_pass_it_are_read(length):
    model = tiny()
    engine = ServingEngine(model, num_slots=1, max_length=CAPACITY)
    prompt = [1, *np.random.default_rng(1).integers(3, 259, size=length - 1).tolist()]
    assert reused(engine, prompt[:100]) == [0]
    (slot,) = engine.insert([Request(prompt_ids=prompt, max_tokens=1)])
    made = engine.step(1)[slot]
    assert made.tokens == list(generate(model, prompt, max_tokens=1))
    assert made.num_reused == (100 if length == CAPACITY else 0)
