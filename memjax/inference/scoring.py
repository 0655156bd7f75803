"""Score given tokens: log-probabilities, in a few compiled shapes.

Every evaluation uses `score`: recall, bits of knowledge, bits per byte and lm-eval's tasks score continuations of
contexts. `PromptScorer` scores a server's prompts, with the likeliest tokens at each position.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int

from memjax.data.packing import Batch
from memjax.data.tokenizers.base import Tokenizer
from memjax.inference.programs import padded_length, top_count
from memjax.inference.requests import TokenLogprobs
from memjax.inference.sampling import Likelihoods, likelihoods
from memjax.inference.score_rows import Pack, ScoreRequest, Shape, batch_of, by_shape, packed, rows_of
from memjax.inference.weights import prepare
from memjax.models.decoder import Decoder
from memjax.models.loss import map_logits
from memjax.models.token_ids import check_ids
from memjax.sharding.axes import has_memory_axis, replicate, split_tokens

Show = Callable[[float], None]
"""Called with the finished fraction of the work, 0 to 1."""
Place = Callable[[Batch], dict[str, jax.Array]]
"""Transfers the arrays of a batch to the devices."""

_PROMPT_POSITIONS = 256
"""Positions of a prompt whose logits are in memory at a time."""


class Score(NamedTuple):
    """Likelihood of a continuation."""

    log_likelihood: float
    """Sum over its tokens of log p, in nats."""
    is_greedy: bool
    """Whether each token is the likeliest one after those before it."""


def to_device(batch: Batch) -> dict[str, jax.Array]:
    """The batch as JAX arrays; the compiler chooses their sharding."""
    return {name: jnp.asarray(array) for name, array in batch.items()}


def request(tokenizer: Tokenizer, context: str, continuation: str) -> ScoreRequest:
    """The context as a prompt, and the tokens that the continuation adds when both are encoded as one text.

    Trailing spaces of the context count as part of the continuation, because tokens include the space before a word.
    """
    before = tokenizer.encode(context.rstrip())
    joined = tokenizer.encode(context + continuation)
    return ScoreRequest(tokenizer.prompt(before), joined[len(before) :])


def score(
    model: Decoder,
    requests: Iterable[ScoreRequest],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    place: Place = to_device,
    show: Show | None = None,
) -> list[Score]:
    """The score of each request.

    Every token of a continuation counts exactly once. If context and continuation together exceed max_length, the
    context is truncated from the left; a continuation that is itself longer is scored in windows of max_length
    predictions, each with as much text before it as fits.

    Requests see neither each other nor the padding, so the batch size and other requests can change a score only
    through the order of summation. Tokens with which several requests begin, such as examples or a question before its
    choices, are computed once for as many of them as fit into a row.

    Args:
        model: the model.
        requests: what to score.
        max_length: maximum number of tokens that the model sees; None: all of each request.
        batch_size: rows per batch; under a mesh, a multiple of the number of devices.
        place: transfers a batch to the devices.
        show: is called with the finished fraction of the work.

    Raises:
        ValueError: a context is empty, or a token id is outside the vocabulary.
    """
    requests = list(requests)
    for number, one in enumerate(requests):
        for name, ids in zip(one._fields, one, strict=True):
            check_ids(ids, model.config.vocab_size, f"the ids of the {name} of request {number}")
    longest = max((len(one.context) + len(one.continuation) for one in requests), default=1)
    # Neither rotary frequencies nor a window may count the tokens of a row.
    can_share = model.config.sliding_window is None and not model.config.rotates_by_length
    packs = packed(rows_of(requests, max_length or longest), can_share=can_share)
    groups = by_shape(packs, batch_size)
    nats, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    done, total = 0, sum(shape.width * len(packs) for shape, packs in groups)
    for shape, packs, (log_p, best) in _computed(model, groups, batch_size, place):
        for number, pack in enumerate(packs):
            for owner, where in pack.owners():
                nats[owner] += log_p[number, where].sum(dtype=np.float64)
                greedy[owner] &= bool(best[number, where].all())
        done += shape.width * len(packs)
        if show:
            show(done / total)
    return [Score(float(one), bool(is_greedy)) for one, is_greedy in zip(nats, greedy, strict=True)]


def _computed(model: Decoder, groups: Any, batch_size: int, place: Place) -> Iterator[tuple[Shape, list[Pack], Any]]:
    """Yields shape, packs and scores (NumPy arrays) of each batch; a batch is computed while the next is prepared."""
    graphdef, state = nnx.split(model)
    before = None
    for shape, packs in groups:
        num_rows = shape.num_rows(batch_size, len(packs))
        for start in range(0, len(packs), num_rows):
            some = packs[start : start + num_rows]
            found = _scored(graphdef, state, place(batch_of(some, num_rows, shape)))
            if before:
                yield *before[:2], jax.device_get(before[2])
            before = shape, some, found
    if before:
        yield *before[:2], jax.device_get(before[2])


@partial(jax.jit, static_argnums=0)
def _scored(
    graphdef: Any, state: nnx.State, batch: dict[str, Array]
) -> tuple[Float[Array, "b depth"], Bool[Array, "b depth"]]:
    """Log-probability (nats) of each target at its position, and whether the target is the likeliest token there."""
    model = nnx.merge(graphdef, state)
    # Padding at the end is harmless: tokens see only what comes before them.
    order = batch.get("positions"), batch.get("segments")
    hidden = model.hidden(batch["tokens"], *order, token_mask=batch["token_mask"]).states
    # Only these places need logits; everywhere, the logits would be the largest array of all.
    hidden = jnp.take_along_axis(hidden, batch["predicted"][..., None], axis=1)

    def compare(logits: Float[Array, "b s vocab"], targets: Int[Array, "b s"]) -> tuple[Array, Array]:
        return likelihoods(logits, targets, 0).chosen, jnp.argmax(logits, axis=-1) == targets

    log_p, best = map_logits(model, compare, hidden, batch["targets"])
    return replicate(log_p), replicate(best)


class PromptScorer:
    """Log-probabilities of prompts, one prompt at a time; one program is compiled per padded length."""

    def __init__(self, model: Decoder):
        """Shares prepared weights with the `Engine` of this model."""
        self._graphdef, self._weights = nnx.split(prepare(model).model)
        self._vocab_size = model.config.vocab_size

    def __call__(self, prompt_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """The log-probability of every token but the first, and the num_top likeliest tokens at its position."""
        found = jax.device_get(_prompt_likelihoods(*self._arguments(prompt_ids, num_top)))
        return [
            TokenLogprobs(float(chosen), dict(zip(ids[:num_top].tolist(), top[:num_top].tolist(), strict=True)))
            for chosen, top, ids in zip(found.chosen, found.top, found.top_tokens, strict=True)
        ][: len(prompt_ids) - 1]

    def lower(self, width: int, num_top: int) -> Lowered:
        """Traces, without running, the program for prompts padded to this width, for the caller to compile."""
        return _prompt_likelihoods.lower(*self._arguments([0] * width, num_top))

    def _arguments(self, prompt_ids: Sequence[int], num_top: int) -> tuple[Any, ...]:
        rows = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        tokens = np.zeros((rows, padded_length(len(prompt_ids))), np.int32)
        tokens[:, : len(prompt_ids)] = prompt_ids
        is_text = np.broadcast_to(np.arange(tokens.shape[1])[None] < len(prompt_ids), tokens.shape)
        return self._graphdef, top_count(num_top, self._vocab_size), self._weights, tokens, is_text


@partial(jax.jit, static_argnums=(0, 1))
def _prompt_likelihoods(
    graphdef: Any, num_top: int, weights: nnx.State, tokens: Int[Array, "b s"], is_text: Bool[Array, "b s"]
) -> Likelihoods:
    """Likelihoods at each position of the first row: of the next token, and of the likeliest tokens."""
    model = nnx.merge(graphdef, weights)
    hidden, _ = model.hidden_with_cache(split_tokens(tokens), None, split_tokens(is_text))
    following = jnp.roll(tokens[:1], -1, axis=1)
    # Every device computes all logits of the one row.
    logit_bytes = 4 * _PROMPT_POSITIONS * model.config.vocab_size // len(tokens)
    one = replicate(hidden)[:1]
    found = map_logits(model, partial(likelihoods, num_top=num_top), one, following, logit_bytes=logit_bytes)
    return jax.tree.map(lambda array: replicate(array[0]), found)
