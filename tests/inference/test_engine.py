"""Generation with the cache gives the tokens of the plain forward pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ModelConfig, RopeScalingConfig
from memjax.config.sampling import SamplingConfig
from memjax.inference import engine, programs
from memjax.inference.engine import Engine
from memjax.inference.requests import Request
from memjax.inference.scoring import PromptScorer, ScoreRequest, score
from memjax.inference.streaming import generate
from memjax.inference.weights import prepare
from memjax.knowledge.trace import trace
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, split_decoder

LONGEST = 32


forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def tiny(memory: bool = True, num_kv_heads: int | None = None) -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=3 if memory else 2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_dim=32,
        vocab_size=259,
        dtype="float32",
        memory=MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
        peer=PEERConfig(layers=(2,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
    )
    return drawn(config)


def prompt(length: int) -> list[int]:
    return [1, *np.random.default_rng(length).integers(3, 259, size=length - 1).tolist()]


def by_hand(model: Decoder, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    text = list(tokens)
    for _ in range(count):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(forward(model, jnp.asarray(padded))[0, len(text) - 1])))
    return text[len(tokens) :]


@pytest.mark.parametrize(("memory", "num_kv_heads", "lengths"), [(True, 2, (1, 5, 15, 16, 17)), (False, None, (5,))])
def test_cached_greedy_equals_the_plain_forward_pass(memory, num_kv_heads, lengths):
    model = tiny(memory, num_kv_heads)
    for length in lengths:
        assert list(generate(model, prompt(length), max_tokens=10)) == by_hand(model, prompt(length), 10)


def test_a_mesh_writes_the_same(mesh):
    model = tiny(True, 2)
    parts, params, tables = split_decoder(model)
    alone = list(generate(model, prompt(5), max_tokens=10))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "memory"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        spread = parts.merge(jax.device_put(params, whole), jax.device_put(tables, columns))
        assert list(generate(spread, prompt(5), max_tokens=10)) == alone


def test_draws_repeat_by_seed_and_differ_between_seeds():
    def draw(seed: int, temperature: float) -> list[int]:
        return list(
            generate(
                tiny(True, 2), prompt(5), max_tokens=10, sampling=SamplingConfig(temperature=temperature, seed=seed)
            )
        )

    assert draw(3, 1.0) == draw(3, 1.0)
    assert draw(3, 1.0) != draw(4, 1.0)
    assert draw(3, 1e-6) == draw(4, 1e-6) == draw(0, 0.0)


def side_by_side(
    model: Decoder,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    slots: int | None = None,
    first: int = 0,
    **settings: Any,
) -> list[list[int]]:
    """Decodes all prompts in one engine; they are numbered from `first`."""
    running = Engine(model, num_slots=slots or len(prompts), prefill_rows=slots or len(prompts))
    requests = [
        Request(prompt_ids=ids, max_tokens=max_tokens, number=number, **settings)
        for number, ids in enumerate(prompts, first)
    ]
    texts: dict[int, list[int]] = {slot: [] for slot in running.insert(requests)}
    while running.is_busy:
        for slot, made in running.step(8).items():
            texts[slot] += made.tokens
    return list(texts.values())


SAMPLINGS = {
    "greedy": SamplingConfig(),
    "drawn": SamplingConfig(temperature=1.0, seed=3),
    "cut": SamplingConfig(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=5),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_batch_gives_each_prompt_what_it_gets_alone(name):
    model, sampling = tiny(True, 2), SAMPLINGS[name]
    prompts = [prompt(length) for length in (5, 17, 9, 20)]
    alone = [
        list(generate(model, prompt_ids, max_tokens=12, sampling=sampling, number=number))
        for number, prompt_ids in enumerate(prompts)
    ]
    batches = [(start, prompts[start : start + 3]) for start in (0, 3)]
    together = [side_by_side(model, some, 12, sampling=sampling, first=start, slots=3) for start, some in batches]
    assert together[0] + together[1] == alone


def test_each_prompt_ends_for_itself():
    model = tiny(True, 2)
    prompts = [prompt(length) for length in (5, 17, 9)]
    whole = side_by_side(model, prompts, 12)
    stop = whole[1][5]
    lengths = [tokens.index(stop) if stop in tokens else 12 for tokens in whole]
    assert len(set(lengths)) > 1
    found = side_by_side(model, prompts, 12, stop_ids=(stop,))
    assert found == [tokens[:length] for tokens, length in zip(whole, lengths, strict=True)]


def test_equal_prompts_with_other_numbers_get_other_draws():
    texts = side_by_side(tiny(True, 2), [prompt(17)] * 3, 12, sampling=SAMPLINGS["drawn"])
    assert len(set(map(tuple, texts))) == 3


def drawn_by_hand(model: Decoder, tokens: list[int], count: int, sampling: SamplingConfig, number: int) -> list[int]:
    """Samples from whole forward passes: candidates are found by sorting, draws use the documented keys."""
    text = list(tokens)
    for step in range(count):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(forward(model, jnp.asarray(padded))[0, len(text) - 1])
        kept = allowed_by_hand(
            logits, set(text), sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty
        )
        log_p = np.full(len(logits), -np.inf, np.float32)
        for token, probability in kept.items():
            log_p[token] = np.log(probability)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), number), step)
        text.append(int(jax.random.categorical(key, jnp.asarray(log_p))))
    return text[len(tokens) :]


@pytest.mark.parametrize("name", ["drawn", "cut"])
def test_draws_are_those_of_the_plain_forward_pass(name):
    model, sampling = tiny(True, 2), SAMPLINGS[name]
    for number, length in ((0, 5), (7, 17)):
        expected = drawn_by_hand(model, prompt(length), 8, sampling, number)
        assert list(generate(model, prompt(length), max_tokens=8, sampling=sampling, number=number)) == expected


def request(length: int, **settings) -> Request:
    return Request(**({"prompt_ids": prompt(length), "max_tokens": 12, "number": length} | settings))


def alone(model: Decoder, one: Request) -> list[int]:
    return list(
        generate(
            model,
            one.prompt_ids,
            max_tokens=one.max_tokens,
            sampling=one.sampling,
            stop_ids=one.stop_ids,
            number=one.number,
        )
    )


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_requests_that_join_and_leave_write_what_they_write_alone(chunk):
    model = tiny(True, 2)
    stop = alone(model, request(9))[6]
    requests = [
        request(5),
        request(9, stop_ids=(stop,)),
        request(17, sampling=SAMPLINGS["drawn"], max_tokens=7),
        request(3, sampling=SAMPLINGS["cut"]),
        request(20, max_tokens=1),
        request(4, max_tokens=20),
    ]
    writer, waiting, texts, finishes, owners = Engine(model, num_slots=3), list(range(6)), {}, {}, {}
    while waiting or writer.is_busy:
        joining = waiting[: len(writer.free_slots)]
        waiting = waiting[len(joining) :]
        for number, slot in zip(joining, writer.insert([requests[number] for number in joining]), strict=True):
            owners[slot], texts[number] = number, []
        for slot, made in writer.step(chunk).items():
            texts[owners[slot]] += made.tokens
            finishes[owners[slot]] = made.finish
    for number, one in enumerate(requests):
        assert texts[number] == alone(model, one), number
    assert [finishes[number] for number in range(6)] == ["length", "stop", "length", "length", "length", "length"]


def test_a_released_slot_accepts_another_text():
    model = tiny(True, 2)
    writer = Engine(model, num_slots=2)
    first, second = writer.insert([request(5), request(9)])
    writer.release(first)
    (again,) = writer.insert([request(17)])
    assert again == first
    made = writer.step(3)
    assert set(made) == {first, second}
    assert made[first].tokens == alone(model, request(17))[:4]
    writer.release(second)
    assert set(writer.step(3)) == {first}
    assert writer.free_slots == [second]
    with pytest.raises(ValueError, match="2 requests do not fit into 1 free slots of 2"):
        writer.insert([request(5), request(9)])
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=rf"slot={slot} must be in 0\.\.1; release what insert has returned"):
            writer.release(slot)
    assert writer.free_slots == [second]


def biased_by_hand(model: Decoder, tokens: list[int], count: int, bias: dict[int, float]) -> list[tuple[int, float]]:
    """Greedy decoding without a cache, with a bias; each token with the model's own log-probability."""
    text, made = list(tokens), []
    for _ in range(count):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        logits = np.array(forward(model, jnp.asarray(padded))[0, len(text) - 1], np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        logits[list(bias)] += list(bias.values())
        text.append(int(np.argmax(logits)))
        made.append((text[-1], log_p[text[-1]]))
    return made


def test_biases_change_what_is_written_and_not_the_log_probabilities():
    model = tiny(True, 2)
    first = alone(model, request(5))
    several: list[dict[int, float]] = [
        {},
        dict.fromkeys(first[:3], -100.0),
        {7: 100.0, first[0]: -100.0},
        {token: float(value) for token, value in enumerate(2 * np.random.default_rng(0).normal(size=259))},
    ]
    requests = [request(5, logit_bias=bias, logprobs=0) for bias in several]
    expected = [biased_by_hand(model, prompt(5), 12, bias) for bias in several]
    assert not {token for token, _ in expected[1]} & set(first[:3])
    assert {token for token, _ in expected[2]} == {7}
    assert len({tuple(token for token, _ in made) for made in expected}) == 4
    writer = Engine(model, num_slots=4)
    found: dict[int, list[tuple[int, float]]] = {slot: [] for slot in writer.insert(requests)}
    while writer.is_busy:
        for slot, made in writer.step(5).items():
            found[slot] += zip(made.tokens, [one.chosen for one in made.logprobs], strict=True)
    for text, by_hand_ in zip(found.values(), expected, strict=True):
        assert [token for token, _ in text] == [token for token, _ in by_hand_]
        np.testing.assert_allclose([value for _, value in text], [value for _, value in by_hand_], atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_ids": range(1025)}, "stop_ids holds 1,025 tokens; it may hold at most 1,024"),
        ({"logit_bias": {259: 1.0}}, r"logit_bias hold 259; the model knows 0\.\.258"),
        ({"logit_bias": {3: 100.5}}, r"logit_bias holds 100\.5; a bias must be in -100\.\.100"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias holds nan; a bias must be"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias holds 301 tokens; it may hold at most 300"),
    ],
)
def test_stop_tokens_and_biases_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(True, 2), num_slots=1).insert([request(5, **settings)])


def test_a_cache_grows_under_a_text(monkeypatch):
    monkeypatch.setattr(engine, "_AT_ONCE", 0)
    model = tiny(False, None)
    assert alone(model, request(5, max_tokens=27)) == by_hand(model, prompt(5), 27)


def test_long_prompts_are_read_in_groups(monkeypatch):
    model = tiny(True, 2)
    requests = [request(length) for length in (5, 17, 9, 20)]
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", 40)
    writer = Engine(model, num_slots=4)
    slots, read = writer.insert(requests), writer._unread
    assert [fresh.state.cache.blocks[0].keys.shape[::2] for fresh in read] == [(1, 16), (1, 32), (1, 16), (1, 32)]
    made = writer.step(11)
    assert [made[slot].tokens for slot in slots] == [alone(model, one) for one in requests]
    # Batches are padded with rows only within the same bound.
    writer = Engine(model, num_slots=4, prefill_rows=4)
    writer.insert(requests)
    assert [len(fresh.tokens) for fresh in writer._unread] == [2, 1, 2, 1]
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", 64)
    writer = Engine(model, num_slots=4, prefill_rows=4)
    writer.insert(requests[:3])
    assert [len(fresh.tokens) for fresh in writer._unread] == [2, 4]


def test_log_probabilities_are_those_of_the_plain_forward_pass():
    model = tiny(True, 2)
    sampling = SamplingConfig(temperature=2.0, top_k=9, repetition_penalty=1.5, seed=2)
    writer = Engine(model, num_slots=2)
    first, second = writer.insert([request(5, sampling=sampling, logprobs=3), request(9, sampling=sampling)])
    made = writer.step(5)
    assert made[second].logprobs == []
    text = prompt(5)
    assert len(made[first].tokens) == len(made[first].logprobs) == 6
    for token, found in zip(made[first].tokens, made[first].logprobs, strict=True):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(forward(model, jnp.asarray(padded))[0, len(text) - 1], np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert found.chosen == pytest.approx(log_p[token], abs=1e-4)
        assert list(found.top) == np.argsort(-log_p)[:3].tolist()
        assert list(found.top.values()) == pytest.approx(np.sort(log_p)[::-1][:3].tolist(), abs=1e-4)
        text.append(token)


def test_as_many_likeliest_tokens_as_a_small_vocabulary_has():
    config = ModelConfig(dim=8, num_layers=1, num_heads=2, ffn_dim=8, vocab_size=12, dtype="float32", memory=None)
    model = drawn(config)
    writer = Engine(model, num_slots=1)
    (slot,) = writer.insert([Request(prompt_ids=[1, 2], max_tokens=2, logprobs=12)])
    found = writer.step(1)[slot].logprobs
    assert [len(one.top) for one in found] == [12, 12]
    assert [sum(map(np.exp, one.top.values())) for one in found] == pytest.approx([1, 1])
    assert PromptScorer(model)([1, 2], 12)[0].top.keys() == set(range(12))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(kind="dynamic", factor=4.0, original_length=8),
        RopeScalingConfig(
            kind="longrope", factor=4.0, original_length=16, short_factor=(1.0, 1.5), long_factor=(4.0, 9.0)
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_where_frequencies_depend_on_the_length_of_a_text_its_padding_and_other_texts_do_not_count(scaling):
    model = drawn(dataclasses.replace(tiny().config, num_layers=2, peer=None, rope_scaling=scaling))
    texts = {length: prompt(length) for length in (11, 30)}
    whole = {length: np.asarray(forward(model, jnp.asarray([text]))[0], np.float64) for length, text in texts.items()}
    log_p = {length: logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) for length, logits in whole.items()}
    writer = Engine(model, num_slots=2, prefill_rows=2)
    slots = writer.insert([Request(prompt_ids=text, max_tokens=1, logprobs=1) for text in texts.values()])
    made = writer.step(0)
    for slot, length in zip(slots, texts, strict=True):
        (token,), (found,) = made[slot].tokens, made[slot].logprobs
        assert token == np.argmax(whole[length][-1])
        assert found.chosen == pytest.approx(log_p[length][-1, token], abs=1e-4)
    scored = score(model, [ScoreRequest(text, [7]) for text in texts.values()], batch_size=8)
    assert [one.log_likelihood for one in scored] == pytest.approx([log_p[n][-1, 7] for n in texts], abs=1e-4)
    score_prompt = PromptScorer(model)
    logits = nnx.jit(lambda model, tokens, mask: model.logits(model.hidden(tokens, token_mask=mask).states))
    for length, text in texts.items():
        following = log_p[length][np.arange(length - 1), text[1:]]
        found = [one.chosen for one in score_prompt(text, 0)]
        np.testing.assert_allclose(found, following, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            trace(model, text).logits[:-1], whole[length][np.arange(length - 1), text[1:]], atol=1e-3
        )
        padded, is_text = np.zeros((1, 32), np.int32), np.arange(32)[None] < length
        padded[0, :length] = text
        found = logits(model, jnp.asarray(padded), jnp.asarray(is_text))
        np.testing.assert_allclose(found[0, :length], whole[length], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_sixteen_bit_logits_follow_those_of_the_plain_forward_pass():
    config = dataclasses.replace(tiny(False, None).config, dtype="bfloat16")
    _, params, tables = split_decoder(tiny(False, None))
    model = DecoderParts.of(config).merge(params, tables)
    forced = alone(model, request(5, max_tokens=20))
    cache, logits = model.init_cache(1, 32), []
    extend = nnx.jit(lambda model, tokens, cache: model.with_cache(tokens, cache))
    for token in prompt(5) + forced:
        found, cache = extend(prepare(model).model, jnp.asarray([[token]]), cache)
        logits.append(found[0, 0])
    whole = np.asarray(forward(model, jnp.asarray([prompt(5) + forced]))[0])
    # The network's weights are large: its logits reach 20.
    np.testing.assert_allclose(np.asarray(logits), whole, atol=2e-2 * np.abs(whole).max())


def allowed_by_hand(logits, seen, temperature, top_k, top_p, penalty):
    """The probabilities to sample from, computed one token at a time."""
    scores = np.array(logits, np.float64)
    for token in seen:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    likeliest = np.argsort(-scores, kind="stable")[:top_k]
    weights = np.exp((scores[likeliest] - scores.max()) / temperature)
    weights /= weights.sum()
    kept, total = {}, 0.0
    for token, weight in zip(likeliest, weights, strict=True):
        kept[int(token)] = weight
        total += weight
        if total >= top_p:
            break
    return {token: weight / total for token, weight in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(0.5, None, 1.0, 1.0), (2.0, 5, 1.0, 1.0), (2.0, None, 0.6, 1.0), (1.5, 12, 0.8, 2.0), (1.0, 1, 0.5, 1.0)],
)
def test_draws_have_the_probabilities_that_the_settings_leave(temperature, top_k, top_p, penalty):
    model, text = tiny(True, 2), prompt(LONGEST)
    logits = np.asarray(forward(model, jnp.asarray([text]))[0, -1])
    expected = allowed_by_hand(logits, set(text), temperature, top_k, top_p, penalty)
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    count = 500
    drawn = [token for (token,) in side_by_side(model, [text] * count, 1, sampling=sampling)]
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        spread = np.sqrt(count * probability * (1 - probability))
        assert abs(drawn.count(token) - count * probability) <= 4.5 * spread + 1


def test_a_penalty_keeps_greedy_text_from_repeating_itself():
    sampling = SamplingConfig(repetition_penalty=100.0)
    tokens = list(generate(tiny(True, 2), prompt(5), max_tokens=20, sampling=sampling))
    assert len({*prompt(5), *tokens}) == len(set(prompt(5))) + 20


def penalised_by_hand(model: Decoder, tokens: list[int], count: int, sampling: SamplingConfig) -> list[int]:
    """Greedy decoding without a cache, with penalties for the tokens generated so far."""
    text = list(tokens)
    for _ in range(count):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        logits = np.array(forward(model, jnp.asarray(padded))[0, len(text) - 1], np.float64)
        for token in set(text):
            logits[token] *= sampling.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        for token in text[len(tokens) :]:
            logits[token] -= sampling.frequency_penalty
        for token in set(text[len(tokens) :]):
            logits[token] -= sampling.presence_penalty
        text.append(int(np.argmax(logits)))
    return text[len(tokens) :]


def test_penalties_count_what_was_written_alone_and_in_a_batch():
    model = tiny(True, 2)
    samplings = [
        SamplingConfig(),
        SamplingConfig(frequency_penalty=2.0),
        SamplingConfig(presence_penalty=-2.0),
        SamplingConfig(repetition_penalty=0.5, frequency_penalty=-1.5, presence_penalty=1.0),
    ]
    # Tokens of the prompt do not count, however often they occur.
    requests = [request(9, prompt_ids=[1, *[7] * 8], sampling=sampling, max_tokens=20) for sampling in samplings]
    expected = [penalised_by_hand(model, list(one.prompt_ids), 20, one.sampling) for one in requests]
    assert len(set(map(tuple, expected))) > 2
    assert [alone(model, one) for one in requests] == expected
    writer = Engine(model, num_slots=3)
    texts: dict[int, list[int]] = {}
    for one in requests:
        # A request that joins moves the running ones to another compiled program.
        if not writer.free_slots:
            writer.release(0)
        (slot,) = writer.insert([one])
        texts[slot] = []
        for number, made in writer.step(2).items():
            texts[number] += made.tokens
    while writer.is_busy:
        for number, made in writer.step(8).items():
            texts[number] += made.tokens
    assert [texts[1], texts[2], texts[0]] == expected[1:]


def test_tokens_come_one_by_one_and_stop_before_a_stop_token():
    model = tiny(True, 2)
    tokens = list(generate(model, prompt(5), max_tokens=10))
    assert next(generate(model, prompt(5), max_tokens=10)) == tokens[0]
    stop = tokens[4]
    first = tokens.index(stop)
    assert list(generate(model, prompt(5), max_tokens=10, stop_ids=(stop,))) == tokens[:first]
    assert list(generate(model, prompt(5), max_tokens=7)) == tokens[:7]
    assert list(generate(model, prompt(5), max_tokens=0)) == []


def num_compiled(model: Decoder) -> list[int]:
    compiled: Any = [*Engine(model, num_slots=1)._programs, programs.start, programs.insert, programs.grow]
    return [program._cache_size() for program in compiled]


@pytest.mark.slow
def test_nearby_lengths_share_compiled_programs():
    model = tiny(True, 2)
    list(generate(model, prompt(9), max_tokens=8))
    compiled = num_compiled(model)
    for length in (10, 13, 16):
        list(generate(model, prompt(length), max_tokens=9))
    assert num_compiled(model) == compiled
    # Partial batches and other sampling parameters reuse the compiled programs, too.
    for some in ([prompt(3), prompt(12), prompt(7)], [prompt(16)]):
        for seed, top_k in ((0, 3), (1, 5)):
            sampling = SamplingConfig(temperature=1.0 + seed, top_k=top_k, seed=seed)
            side_by_side(model, some, 9, sampling=sampling, slots=3)
    for now, before in zip(num_compiled(model), compiled, strict=True):
        assert now <= before + 1


def test_what_cannot_be_done_is_refused_at_the_call():
    model = tiny(True, 2)
    with pytest.raises(ValueError, match="ids of prompt 0 are empty"):
        generate(model, [], max_tokens=1)
    with pytest.raises(ValueError, match=r"prompt 0 hold 259; the model knows 0\.\.258"):
        generate(model, [1, 259], max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        generate(model, [1], max_tokens=-1)
    for num_slots, prefill_rows, wrong_one in ((0, None, "num_slots=0"), (1, 0, "prefill_rows=0")):
        with pytest.raises(ValueError, match=f"{wrong_one} must be positive"):
            Engine(model, num_slots=num_slots, prefill_rows=prefill_rows)
    with pytest.raises(ValueError, match="prefill_rows=0 must be positive"):
        Engine(model, num_slots=1).insert([Request(prompt_ids=[1], max_tokens=1)], prefill_rows=0)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"temperature": -0.5}, r"temperature=-0\.5 must not be negative"),
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"min_p": 1.5}, r"min_p=1\.5 must be in 0\.\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be in 0\.01\.\.100"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**wrong)
