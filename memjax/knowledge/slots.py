"""Slot statistics over a corpus: document frequency of every slot, and the contexts that read one slot most."""

import functools
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.config.model import ModelConfig
from memjax.data.sources.records import Record
from memjax.data.tokenize import Pairs
from memjax.data.tokenizers.base import Tokenizer
from memjax.knowledge.facts import batch_of, pairs_of, windows
from memjax.knowledge.reads import layers_of, run_layers, slot_reads, tables_of, through_norm
from memjax.models.decoder import Decoder
from memjax.models.token_ids import check_vocabulary
from memjax.ops.embedding_bag.api import embedding_bag
from memjax.sharding.axes import committed_as

_RECORDS_AT_ONCE = 256


class Background(NamedTuple):
    """Document frequency of every slot in a corpus."""

    texts: int
    counts: dict[str, Int[np.ndarray, " n"]]
    """Number of texts that read each row, by table name."""


def layers_by_table(config: ModelConfig) -> dict[str, list[str]]:
    """The layers whose output is a sum of rows of a table, by table name."""
    layers: dict[str, list[str]] = {}
    for layer in layers_of(config):
        layers.setdefault(tables_of(config, layer)[-1], []).append(layer)
    return layers


def count_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    *,
    length: int,
    batch_size: int = 32,
) -> Background:
    """Counts, for every slot, how many windows of `length` tokens of the texts read it.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    graphdef, state = nnx.split(model)
    tables = model.config.tables
    counts = {name: jnp.zeros(tables[name].num_slots, jnp.int32) for name in layers_by_table(model.config)}
    counts, total = committed_as(counts, state), 0
    for some in _batches(_windows(tokenizer, records, length), batch_size):
        counts = _add_texts(graphdef, state, counts, batch_of(some, (batch_size, length)))
        total += len(some)
    return Background(total, {name: np.asarray(found) for name, found in counts.items()})


def _windows(tokenizer: Tokenizer, records: Iterable[Record], length: int) -> Iterator[Pairs]:
    for some in _batches(records, _RECORDS_AT_ONCE):
        yield from windows(pairs_of(some, tokenizer), length)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_texts(
    graphdef: Any, state: nnx.State, counts: dict[str, Int[Array, " n"]], batch: Mapping[str, Array]
) -> dict[str, Int[Array, " n"]]:
    """The counts, increased for each slot by the number of rows of the batch that read it."""
    model = nnx.merge(graphdef, state)
    token_mask = batch["segments"] > 0
    reads = slot_reads(model.hidden(batch["tokens"], token_mask=token_mask))

    def add(layers: list[str], before: Int[Array, " n"]) -> Int[Array, " n"]:
        num_slots = before.shape[0]

        def add_row(total: Array, picks: Int[Array, "s k"]) -> tuple[Array, None]:
            is_read = jnp.zeros(num_slots, total.dtype).at[picks.reshape(-1)].set(1, mode="drop")
            return total + is_read, None

        picks = jnp.concatenate([reads[layer].indices.reshape(*token_mask.shape, -1) for layer in layers], axis=-1)
        # Padding reads a slot that does not exist.
        picks = jnp.where(token_mask[..., None], picks, num_slots)
        return jax.lax.scan(add_row, before, picks)[0]

    return {name: add(layers, counts[name]) for name, layers in layers_by_table(model.config).items()}


class Context(NamedTuple):
    """A position in a corpus that reads a slot."""

    weight: float
    tokens: tuple[int, ...]
    """The text up to and including the token that reads it, with the begin token."""
    after: tuple[int, ...]
    """The tokens that follow."""


class SlotReport(NamedTuple):
    """The contexts that read a slot, and the tokens that it promotes."""

    texts: int
    """Windows of the corpus that were searched."""
    reads: int
    """Tokens that read the slot."""
    contexts: list[Context]
    """The positions that read it with the largest weights."""
    promoted: list[tuple[int, float]]
    """Tokens to whose logits the row adds most, with what it adds on average over the contexts."""


def slot_report(
    model: Decoder,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    layer: str,
    slot: int,
    *,
    length: int,
    batch_size: int = 32,
    contexts: int = 10,
    promoted: int = 10,
    most: int | None = None,
) -> SlotReport:
    """Finds the contexts of a corpus that read a slot of a layer (such as L4) most, and the tokens it promotes there.

    The first `most` windows of `length` tokens are read (None: all). `contexts` and `promoted` are how many of each to
    return.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    graphdef, state = nnx.split(model)
    best: list[tuple[float, int, Context]] = []
    texts = reads = 0
    for some in _batches(itertools.islice(_windows(tokenizer, records, length), most), batch_size):
        batch = batch_of(some, (batch_size, length))
        weights = np.asarray(_slot_weights(graphdef, layer, state, batch, jnp.asarray(slot)))
        texts += len(some)
        rows, places = np.nonzero(weights)
        reads += len(rows)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            tokens = tuple(some[row][:, 0].tolist())
            context = Context(float(weights[row, place]), tokens[: place + 1], tokens[place + 1 :])
            # Numbered, so that contexts of equal weight are never compared.
            heapq.heappush(best, (abs(context.weight), -reads - len(best), context))
            if len(best) > contexts:
                heapq.heappop(best)
    kept = [context for _, _, context in sorted(best, reverse=True)]
    if not kept:
        return SlotReport(texts, reads, [], [])
    mean = np.mean([_promotes(graphdef, layer, state, slot, context, length) for context in kept], axis=0)
    order = np.argsort(-mean)[:promoted].tolist()
    return SlotReport(texts, reads, kept, [(token, float(mean[token])) for token in order])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _slot_weights(
    graphdef: Any, layer: str, state: nnx.State, batch: Mapping[str, Array], slot: Array
) -> Float[Array, "b s"]:
    """The weight with which each token reads a slot; 0 if it does not, or is padding."""
    model, token_mask = nnx.merge(graphdef, state), batch["segments"] > 0
    indices, weights = slot_reads(model.hidden(batch["tokens"], token_mask=token_mask))[layer]
    found = jnp.where(indices == slot, weights, 0).sum(axis=-1).reshape(token_mask.shape)
    return jnp.where(token_mask, found, 0)


def _promotes(
    graphdef: Any, layer: str, state: nnx.State, slot: int, context: Context, length: int
) -> Float[np.ndarray, " vocab"]:
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(context.tokens)] = context.tokens
    place = len(context.tokens) - 1
    return np.asarray(_logits_of_slot(graphdef, layer, state, tokens, slot, place, context.weight), np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_of_slot(
    graphdef: Any, layer: str, state: nnx.State, tokens: Array, slot: Array, place: Array, weight: Array
) -> Float[Array, " vocab"]:
    """The contribution of a slot to every logit at a position."""
    model = nnx.merge(graphdef, state)
    runs, x = run_layers(model, tokens, jnp.arange(tokens.shape[1])[None] <= place)
    table = model.tables[tables_of(model.config, layer)[-1]].table
    every = (tokens.shape[1], 1)
    bag = embedding_bag(table, jnp.broadcast_to(slot, every), jnp.broadcast_to(weight, every))
    combine = runs[layer].combine
    added = (combine(bag) - combine(jnp.zeros_like(bag)))[0, place]
    return through_norm(model.norm, added, x[0, place]) @ model.output_matrix().astype(jnp.float32)
