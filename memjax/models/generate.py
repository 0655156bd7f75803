"""Text generation, token by token, with a cache of keys and values."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt

from memjax.config import SamplingConfig
from memjax.memory import parallel
from memjax.models.decoder import Cache, Decoder

_SMALLEST = 16
"""Prompts and caches are padded to powers of two from here on, so that few shapes are ever compiled."""
GREEDY = SamplingConfig()


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    number: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, each as soon as it is made.

    Rotary positions have no last one, so prompt and answer may be longer than the sequences of the training; memory for
    the cache is the only limit.

    Args:
        model: the model.
        prompt_ids: the prompt, its begin token included.
        max_tokens: the most tokens to make.
        sampling: how tokens are picked; by default the likeliest.
        stop_ids: tokens that end the text; they are not yielded.
        number: of the prompt; with the seed it decides the draws.

    Raises:
        ValueError: the prompt is empty or holds ids that the model does not know, or max_tokens is negative.
    """
    steps = generate_batch(
        model, [prompt_ids], max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, first_number=number
    )
    return (token for (token,) in steps if token is not None)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: SamplingConfig = GREEDY,
    stop_ids: Collection[int] = (),
    first_number: int = 0,
    num_rows: int = 1,
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of every prompt; None from where a prompt's text has ended.

    A prompt's tokens are those that it gets alone, whatever stands beside it: every row has positions of its own and
    sees no padding, and the draws depend on the seed, the prompt's number and the step. (Sums in another order can
    still turn the balance between two tokens that are equally likely to the last digits.)

    Args:
        model: the model.
        prompts: ids of each prompt, begin tokens included; of any lengths.
        max_tokens: the most tokens to make for each prompt.
        sampling: how tokens are picked; by default the likeliest.
        stop_ids: tokens that end a text; they are not yielded.
        first_number: the number of the first prompt; the others count on from it.
        num_rows: rows to compute at least. Batches of one size share one compiled program, also a last one that is
            not full.

    Raises:
        ValueError: there is no prompt, one is empty or holds ids that the model does not know, or max_tokens is
            negative.
    """
    vocab_size = model.config.vocab_size
    if not len(prompts):
        raise ValueError("prompts is empty; it needs at least one prompt")
    for number, prompt_ids in enumerate(prompts, first_number):
        if not len(prompt_ids):
            raise ValueError(f"the ids of prompt {number} are empty; they need at least the begin token")
        if unknown := [token for token in prompt_ids if not 0 <= token < vocab_size]:
            raise ValueError(f"the ids of prompt {number} hold {unknown[0]}; the model knows 0..{vocab_size - 1}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    # A function of its own, so that the checks run at the call and not at the first token.
    return _steps(model, prompts, max_tokens, sampling, frozenset(stop_ids), first_number, num_rows)


def _steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    first_number: int,
    num_rows: int,
) -> Iterator[list[int | None]]:
    if not max_tokens:
        return
    graphdef, state = nnx.split(model)
    # A mesh splits rows over its devices, so each needs as many as the others; what is missing are rows that nobody
    # reads.
    devices = jax.sharding.get_abstract_mesh().size if parallel.has_memory_axis() else 1
    num_rows = math.ceil(max(len(prompts), num_rows) / devices) * devices
    longest = max(len(prompt_ids) for prompt_ids in prompts)
    tokens, lengths = np.zeros((num_rows, padded_length(longest)), np.int32), np.ones(num_rows, np.int32)
    for row, prompt_ids in enumerate(prompts):
        tokens[row, : len(prompt_ids)] = prompt_ids
        lengths[row] = len(prompt_ids)
    pick = partial(
        _pick,
        rule=_Rule.of(sampling),
        numbers=jnp.asarray((first_number + np.arange(num_rows)) % 2**32, jnp.uint32),
        greedy=sampling.temperature == 0,
        is_cut=sampling.top_k is not None or sampling.top_p < 1,
    )
    logits, cache, seen = _prefill(
        graphdef,
        state,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        cache_length=max(tokens.shape[1], padded_length(longest + max_tokens)),
    )
    ended = [False] * len(prompts)
    for step in range(max_tokens):
        picked, seen = pick(logits, seen, step=jnp.int32(step))
        made = np.asarray(picked)[: len(prompts)].tolist()
        ended = [before or token in stop_ids for before, token in zip(ended, made, strict=True)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, made, strict=True)]
        if step + 1 < max_tokens:
            logits, cache = _extend(graphdef, state, picked, cache)


def padded_length(length: int) -> int:
    """The length that a row of so many tokens is padded to: a power of two, so that few shapes are ever compiled."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=0, static_argnames="cache_length")
def _prefill(
    graphdef: Any, state: nnx.State, tokens: Int[Array, "b s"], lengths: Int[Array, " b"], *, cache_length: int
) -> tuple[Float[Array, "b vocab"], Cache, Bool[Array, "b vocab"]]:
    """Logits after the first `lengths` tokens of each row, the cache of these, and which tokens they hold."""
    model = nnx.merge(graphdef, state)
    rows, width = tokens.shape
    hidden, cache = model.hidden_with_cache(tokens, model.init_cache(rows, cache_length))
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    vocab_size = model.config.vocab_size
    is_text = jnp.arange(width)[None, :] < lengths[:, None]
    seen = jnp.zeros((rows, vocab_size), bool)
    # Padding is marked past the vocabulary, where nothing is written.
    seen = seen.at[jnp.arange(rows)[:, None], jnp.where(is_text, tokens, vocab_size)].set(True, mode="drop")
    # The padding's keys stay in the cache behind its lengths: nobody sees them, and new tokens overwrite them.
    return model.logits(last), cache._replace(lengths=lengths), seen


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _extend(
    graphdef: Any, state: nnx.State, tokens: Int[Array, " b"], cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Logits after one more token of each row, and the cache with it, written in place."""
    logits, cache = nnx.merge(graphdef, state).with_cache(tokens[:, None], cache)
    return logits[:, -1], cache


class _Rule(NamedTuple):
    """Sampling's numbers as arrays, so that other numbers need no other program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    seed: UInt[Array, ""]

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "_Rule":
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(min(sampling.top_k or 2**31 - 1, 2**31 - 1)),
            # Sums of all probabilities can pass 1 by a rounding error, and then must not cut the last token off.
            top_p=jnp.float32(sampling.top_p if sampling.top_p < 1 else math.inf),
            repetition_penalty=jnp.float32(sampling.repetition_penalty),
            seed=jnp.uint32(sampling.seed % 2**32),
        )


@partial(jax.jit, static_argnames=("greedy", "is_cut"), donate_argnames="seen")
def _pick(
    logits: Float[Array, "b vocab"],
    seen: Bool[Array, "b vocab"],
    *,
    rule: _Rule,
    numbers: UInt[Array, " b"],
    step: Int[Array, ""],
    greedy: bool,
    is_cut: bool,
) -> tuple[Int[Array, " b"], Bool[Array, "b vocab"]]:
    """The next token of each row, and the tokens that the rows hold with it."""
    penalty = rule.repetition_penalty.astype(logits.dtype)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if greedy:
        picked = jnp.argmax(logits, axis=-1)
    else:
        logits = logits / rule.temperature.astype(logits.dtype)
        if is_cut:
            logits = jnp.where(_kept(logits, rule.top_k, rule.top_p), logits, -jnp.inf)
        of_run = jax.random.key(rule.seed)
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(of_run, number), step))(numbers)
        # One number is drawn for each token of the vocabulary, not for each rank: ranks that rounding swaps change
        # nothing then.
        picked = jax.vmap(jax.random.categorical)(keys, logits)
    picked = parallel.everywhere(picked.astype(jnp.int32))
    return picked, seen.at[jnp.arange(len(picked)), picked].set(True)


def _kept(logits: Float[Array, "b vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Bool[Array, "b vocab"]:
    """Which tokens may be drawn: the top_k likeliest, and of these the fewest whose probabilities reach top_p."""
    order = jnp.argsort(-logits, axis=-1)
    is_top = (jnp.arange(logits.shape[1]) < top_k)[None, :]
    ordered = jnp.where(is_top, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = is_top & (before < top_p.astype(before.dtype))
    return jnp.zeros_like(kept).at[jnp.arange(len(kept))[:, None], order].set(kept)
