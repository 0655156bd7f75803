"""Generation with the cache writes what the plain forward pass would write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import MemoryConfig, ModelConfig
from memjax.models.decoder import Decoder
from memjax.models.generate import _extend, generate
from memjax.models.parts import DecoderParts, take_apart

LONGEST = 32


forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def tiny(memory: bool = True, num_kv_heads: int | None = None) -> Decoder:
    config = ModelConfig(
        dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_dim=32,
        vocab_size=259,
        dtype="float32",
        memory=MemoryConfig(layers=(1,), num_keys=8, num_heads=2, top_k=4, key_dim=8) if memory else None,
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
        return list(generate(tiny(True, 2), prompt(5), max_tokens=10, temperature=temperature, seed=seed))

    assert draw(3, 1.0) == draw(3, 1.0)
    assert draw(3, 1.0) != draw(4, 1.0)
    assert draw(3, 1e-6) == draw(4, 1e-6) == draw(0, 0.0)


def test_draws_follow_the_softmax():
    model = tiny(True, 2)
    logits = np.asarray(forward(model, jnp.asarray([prompt(LONGEST)]))[0, -1], np.float64) / 0.5
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    drawn = [next(generate(model, prompt(LONGEST), max_tokens=1, temperature=0.5, seed=seed)) for seed in range(200)]
    counts = np.bincount(drawn, minlength=259)
    likeliest = int(np.argmax(expected))
    spread = np.sqrt(200 * expected[likeliest] * (1 - expected[likeliest]))
    assert abs(counts[likeliest] - 200 * expected[likeliest]) < 4 * spread


def test_tokens_come_one_by_one_and_stop_before_a_stop_token():
    model = tiny(True, 2)
    tokens = list(generate(model, prompt(5), max_tokens=10))
    assert next(generate(model, prompt(5), max_tokens=10)) == tokens[0]
    stop = tokens[4]
    first = tokens.index(stop)
    assert list(generate(model, prompt(5), max_tokens=10, stop_ids=(stop,))) == tokens[:first]
    assert list(generate(model, prompt(5), max_tokens=7)) == tokens[:7]
    assert list(generate(model, prompt(5), max_tokens=0)) == []


def num_compiled(function) -> int:
    return function._cache_size()


def test_nearby_lengths_share_what_is_compiled():
    model = tiny(True, 2)
    list(generate(model, prompt(9), max_tokens=8))
    compiled = num_compiled(_extend)
    for length in (10, 13, 16):
        list(generate(model, prompt(length), max_tokens=9))
    assert num_compiled(_extend) == compiled


def test_what_cannot_be_done_is_refused_at_the_call():
    model = tiny(True, 2)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        generate(model, [], max_tokens=1)
    with pytest.raises(ValueError, match=r"holds 259; the model knows 0\.\.258"):
        generate(model, [1, 259], max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        generate(model, [1], max_tokens=-1)
    with pytest.raises(ValueError, match=r"temperature=-0\.5"):
        generate(model, [1], max_tokens=1, temperature=-0.5)
