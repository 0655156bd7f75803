"""Generation with the cache writes what the plain forward pass would write."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import ExpertLookupConfig, MemoryConfig, ModelConfig, SamplingConfig
from memjax.inference import engine
from memjax.inference.engine import generate, generate_batch
from memjax.inference.weights import prepare
from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts, take_apart

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
        expert_lookup=ExpertLookupConfig(layers=(2,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
    )
    parts, rng = DecoderParts.of(config), np.random.default_rng(0)
    # Drawn by NumPy: compiling the initialisation would take longer than all that is tested.
    fill = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype))
    return parts.assemble(fill(parts.abstract_params), fill(parts.abstract_tables))


def prompt(length: int) -> list[int]:
    return [1, *np.random.default_rng(length).integers(3, 259, size=length - 1).tolist()]


def by_hand(model: Decoder, tokens: list[int], count: int) -> list[int]:
    """The likeliest token of the whole text so far, again and again."""
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
    parts, params, tables = take_apart(model)
    alone = list(generate(model, prompt(5), max_tokens=10))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "memory"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        spread = parts.assemble(jax.device_put(params, whole), jax.device_put(tables, columns))
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
    together: list[list[int | None]] = []
    for start in (0, 3):
        some = prompts[start : start + 3]
        steps = generate_batch(model, some, max_tokens=12, sampling=sampling, first_number=start, num_rows=3)
        together += [list(tokens) for tokens in zip(*steps, strict=True)]
    assert together == alone


def test_each_prompt_ends_for_itself():
    model = tiny(True, 2)
    prompts = [prompt(length) for length in (5, 17, 9)]
    whole = list(zip(*generate_batch(model, prompts, max_tokens=12), strict=True))
    stop = whole[1][5]
    lengths = [tokens.index(stop) if stop in tokens else 12 for tokens in whole]
    assert len(set(lengths)) > 1
    steps = list(generate_batch(model, prompts, max_tokens=12, stop_ids=(stop,)))
    assert len(steps) == max(lengths)
    for tokens, full, length in zip(zip(*steps, strict=True), whole, lengths, strict=True):
        assert tokens == (*full[:length], *[None] * (len(steps) - length))


def test_equal_prompts_of_other_numbers_are_drawn_anew():
    steps = generate_batch(tiny(True, 2), [prompt(17)] * 3, max_tokens=12, sampling=SAMPLINGS["drawn"])
    assert len(set(zip(*steps, strict=True))) == 3


def allowed_by_hand(logits, seen, temperature, top_k, top_p, penalty):
    """Probabilities of what may be drawn, one token after the other."""
    scores = np.array(logits, np.float64)
    for token in seen:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    likeliest = np.argsort(-scores)[:top_k]
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
    (drawn,) = generate_batch(model, [text] * count, max_tokens=1, sampling=sampling)
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        spread = np.sqrt(count * probability * (1 - probability))
        assert abs(drawn.count(token) - count * probability) <= 4.5 * spread + 1


def test_a_penalty_keeps_greedy_text_from_repeating_itself():
    sampling = SamplingConfig(repetition_penalty=1e6)
    tokens = list(generate(tiny(True, 2), prompt(5), max_tokens=20, sampling=sampling))
    assert len({*prompt(5), *tokens}) == len(set(prompt(5))) + 20


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
    programs: Any = engine._programs(nnx.split(prepare(model))[0])
    return [program._cache_size() for program in programs]


def test_nearby_lengths_share_what_is_compiled():
    model = tiny(True, 2)
    list(generate(model, prompt(9), max_tokens=8))
    compiled = num_compiled(model)
    for length in (10, 13, 16):
        list(generate(model, prompt(length), max_tokens=9))
    assert num_compiled(model) == compiled
    # Batches that are not full, and other numbers of the sampling, run what is compiled too.
    for some in ([prompt(3), prompt(12), prompt(7)], [prompt(16)]):
        for seed, top_k in ((0, 3), (1, 5)):
            sampling = SamplingConfig(temperature=1.0 + seed, top_k=top_k, seed=seed)
            list(generate_batch(model, some, max_tokens=9, sampling=sampling, num_rows=3))
    for now, before in zip(num_compiled(model), compiled, strict=True):
        assert now <= before + 1


def test_what_cannot_be_done_is_refused_at_the_call():
    model = tiny(True, 2)
    with pytest.raises(ValueError, match="ids of prompt 0 are empty"):
        generate(model, [], max_tokens=1)
    with pytest.raises(ValueError, match="prompts is empty"):
        generate_batch(model, [], max_tokens=1)
    with pytest.raises(ValueError, match=r"prompt 0 hold 259; the model knows 0\.\.258"):
        generate(model, [1, 259], max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        generate(model, [1], max_tokens=-1)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"temperature": -0.5}, r"temperature=-0\.5 must not be negative"),
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**wrong)
