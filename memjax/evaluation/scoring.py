"""Log-likelihoods of token sequences after others, in few compiled shapes that no batch size changes."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.data.packing import Batch
from memjax.data.tokenizers.base import Tokenizer
from memjax.evaluation.perplexity import Place, to_device
from memjax.inference.engine import padded_length
from memjax.models.decoder import Decoder
from memjax.models.loss import LOGIT_BYTES
from memjax.sharding.axes import everywhere

Show = Callable[[float], None]
"""Is told how much of a work is done: 0 to 1."""

_FEW = 16
"""Predictions that most rows stay below; a row with more of them gets logits for all its places."""


class Request(NamedTuple):
    """What to score: `continuation` after `context`, both as token ids."""

    context: Sequence[int]
    """At least the begin token."""
    continuation: Sequence[int]
    """May be empty, which is certain."""


class Score(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float
    """Sum over its tokens of log p, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The context as a prompt, and the tokens that the continuation adds to it when both are encoded as one text.

    Spaces at the end of the context belong to the continuation: tokens carry the space before a word.
    """
    kept = context.rstrip()
    before = tokenizer.encode(kept)
    whole = tokenizer.encode(context + continuation)
    return Request(tokenizer.prompt(before), whole[len(before) :])


def score(
    model: Decoder,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_size: int = 32,
    place: Place = to_device,
    show: Show | None = None,
) -> list[Score]:
    """The score of each request.

    Every token of a continuation counts exactly once. Where context and continuation are longer than the model may see,
    the context's begin is left out; a continuation that is itself longer is read in windows of max_length predictions,
    the last of which reaches back as far as it may.

    A request's window alone decides the shape that it is computed in, and rows do not see each other, so the batch
    size can change a score only by the order of a sum. Requests that read the same tokens, such as four letters after
    one question, are computed as one row.

    Args:
        model: the model.
        requests: what to score.
        max_length: tokens that the model sees at once.
        batch_size: rows at once; under a mesh a multiple of its devices.
        place: puts a batch on the devices.
        show: is told how much is done.

    Raises:
        ValueError: a context is empty.
    """
    graphdef, state = nnx.split(model)
    by_shape: dict[tuple[int, int], list[_Row]] = defaultdict(list)
    for row in _rows(requests, max_length):
        by_shape[row.shape].append(row)
    nats, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    done, total = 0, sum(width * len(rows) for (width, _), rows in by_shape.items())
    for (width, depth), rows in sorted(by_shape.items()):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = place(_batch(some, (batch_size, width, depth)))
            log_p, best = (np.asarray(array) for array in _scored(graphdef, state, batch))
            for number, row in enumerate(some):
                for owner, where in row.owners():
                    nats[owner] += log_p[number, where].sum(dtype=np.float64)
                    greedy[owner] &= bool(best[number, where].all())
            done += width * len(some)
            if show:
                show(done / total)
    return [Score(float(one), bool(is_greedy)) for one, is_greedy in zip(nats, greedy, strict=True)]


class _Row:
    """Tokens that are read together, and what is asked about the tokens after the last of them."""

    def __init__(self, tokens: tuple[int, ...]):
        self.tokens = tokens
        self.asks: list[tuple[int, tuple[int, ...]]] = []
        """Number of a request, and its tokens: the last of them follows the last token of the row."""

    @property
    def depth(self) -> int:
        return sum(len(targets) for _, targets in self.asks)

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and predictions, padded; there are two programs for each width."""
        width = padded_length(len(self.tokens))
        return width, _FEW if self.depth <= _FEW else width

    def predictions(self) -> Iterator[tuple[int, int]]:
        """Places of the row, each with a token that may follow there."""
        for _, targets in self.asks:
            yield from enumerate(targets, start=len(self.tokens) - len(targets))

    def owners(self) -> Iterator[tuple[int, slice]]:
        """The requests, and where in the row's predictions theirs are."""
        ends = itertools.accumulate(len(targets) for _, targets in self.asks)
        for (owner, targets), end in zip(self.asks, ends, strict=True):
            yield owner, slice(end - len(targets), end)


def _rows(requests: Iterable[Request], max_length: int) -> list[_Row]:
    rows: list[_Row] = []
    shared: dict[tuple[int, ...], _Row] = {}
    for owner, (context, continuation) in enumerate(requests):
        if not len(context):
            raise ValueError(f"the context of request {owner} is empty; it needs at least the begin token")
        ids = (*context, *continuation)
        for start in range(len(context), len(ids), max_length):
            stop = min(start + max_length, len(ids))
            tokens, targets = ids[max(0, stop - 1 - max_length) : stop - 1], ids[start:stop]
            row = shared.get(tokens)
            if row is None or row.depth + len(targets) > _FEW:
                row = shared[tokens] = _Row(tokens)
                rows.append(row)
            row.asks.append((owner, targets))
    return rows


def _batch(rows: Sequence[_Row], shape: tuple[int, int, int]) -> Batch:
    """`tokens` of the rows; `places` and the `targets` there. What is missing to the shape is read by nobody."""
    num_rows, width, depth = shape
    tokens = np.zeros((num_rows, width), np.int32)
    places, targets = np.zeros((num_rows, depth), np.int32), np.zeros((num_rows, depth), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        places[number, : row.depth], targets[number, : row.depth] = np.array(list(row.predictions())).T
    return {"tokens": tokens, "places": places, "targets": targets}


@partial(jax.jit, static_argnums=0)
def _scored(
    graphdef: Any, state: nnx.State, batch: dict[str, Array]
) -> tuple[Float[Array, "b depth"], Bool[Array, "b depth"]]:
    """log p of each target at its place, in nats, and whether it is the likeliest there."""
    model = nnx.merge(graphdef, state)
    # Without segments a padded end is harmless: tokens see only what comes before them.
    hidden = model.hidden(batch["tokens"]).states
    # Only these places need logits, which at all places would be the largest array of all.
    hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)

    def one(place: tuple[Float[Array, " dim"], Int[Array, ""]]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        hidden, target = place
        logits = model.logits(hidden)
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    shape = batch["targets"].shape
    flat = (hidden.reshape(-1, hidden.shape[-1]), batch["targets"].reshape(-1))
    most = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    log_p, best = jax.lax.map(one, flat, batch_size=min(most, len(flat[1])))
    return everywhere(log_p.reshape(shape)), everywhere(best.reshape(shape))
