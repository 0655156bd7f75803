"""Text generation, token by token, with a cache of keys and values."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.memory import parallel
from memjax.models.decoder import Cache, Decoder

_SMALLEST = 16
"""Prompts and caches are padded to powers of two from here on, so that few shapes are ever compiled."""


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, each as soon as it is made.

    Rotary positions have no last one, so prompt and answer may be longer than the sequences of the training; memory for
    the cache is the only limit.

    Args:
        model: the model.
        prompt_ids: the prompt, its begin token included.
        max_tokens: the most tokens to make.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the draws; the same seed draws the same tokens.
        stop_ids: tokens that end the text; they are not yielded.

    Raises:
        ValueError: the prompt is empty or holds ids that the model does not know, or a number is negative.
    """
    vocab_size = model.config.vocab_size
    if not len(prompt_ids):
        raise ValueError("prompt_ids is empty; it needs at least the begin token")
    if unknown := [token for token in prompt_ids if not 0 <= token < vocab_size]:
        raise ValueError(f"prompt_ids holds {unknown[0]}; the model knows 0..{vocab_size - 1}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    # A function of its own, so that the checks run at the call and not at the first token.
    return _stream(model, prompt_ids, max_tokens, temperature, seed, frozenset(stop_ids))


def _stream(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    if not max_tokens:
        return
    graphdef, state = nnx.split(model)
    # A mesh splits tokens over its devices, so each device carries a copy of the one sequence.
    copies = jax.sharding.get_abstract_mesh().size if parallel.has_memory_axis() else 1
    padded = np.zeros((copies, _padded(len(prompt_ids))), np.int32)
    padded[:, : len(prompt_ids)] = prompt_ids
    pick = partial(_pick, temperature=jnp.float32(temperature), seed=jnp.uint32(seed % 2**32), greedy=temperature == 0)
    logits, cache = _prefill(
        graphdef,
        state,
        jnp.asarray(padded),
        jnp.int32(len(prompt_ids)),
        cache_length=max(padded.shape[1], _padded(len(prompt_ids) + max_tokens)),
    )
    for step in range(max_tokens):
        token = pick(logits, step=jnp.int32(step))
        if int(token) in stop_ids:
            return
        yield int(token)
        if step + 1 < max_tokens:
            logits, cache = _extend(graphdef, state, token, cache)


def _padded(length: int) -> int:
    return max(_SMALLEST, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=0, static_argnames="cache_length")
def _prefill(
    graphdef: Any, state: nnx.State, tokens: Int[Array, "b s"], length: Int[Array, ""], *, cache_length: int
) -> tuple[Float[Array, " vocab"], Cache]:
    """Logits after the first `length` tokens, and the cache of these."""
    model = nnx.merge(graphdef, state)
    logits, cache = model.with_cache(tokens, model.init_cache(tokens.shape[0], cache_length))
    # The padding's keys stay in the cache behind its length: nobody sees them, and new tokens overwrite them.
    return logits[0, length - 1], cache._replace(length=length)


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _extend(
    graphdef: Any, state: nnx.State, token: Int[Array, ""], cache: Cache
) -> tuple[Float[Array, " vocab"], Cache]:
    """Logits after one more token, and the cache with it, written in place."""
    tokens = jnp.broadcast_to(token, (cache.blocks[0].keys.shape[0], 1))
    logits, cache = nnx.merge(graphdef, state).with_cache(tokens, cache)
    return logits[0, -1], cache


@partial(jax.jit, static_argnames="greedy")
def _pick(
    logits: Float[Array, " vocab"],
    *,
    temperature: Float[Array, ""],
    seed: Array,
    step: Int[Array, ""],
    greedy: bool,
) -> Int[Array, ""]:
    """The next token."""
    if greedy:
        return jnp.argmax(logits).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.categorical(key, logits / temperature.astype(logits.dtype)).astype(jnp.int32)
