"""Sparse memory finetuning (arXiv:2510.15103): new facts change a few rows that they read more than other text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from memjax.data.sources.records import Record
from memjax.data.tokenize import Pairs
from memjax.data.tokenizers.base import Tokenizer
from memjax.knowledge.facts import Fact, batch_of, pairs_of, round_up, width_of, windows
from memjax.knowledge.reads import SlotReads, table_gradients, tables_of
from memjax.knowledge.slots import Background, layers_by_table
from memjax.memory.row_optimizer import RowOptimizer
from memjax.memory.usage import count_reads
from memjax.models.decoder import Decoder
from memjax.models.loss import map_logits, summed_loss
from memjax.models.parts import Tables, merge_decoder, split_decoder, writable
from memjax.models.token_ids import check_vocabulary
from memjax.ops.row_update.rules import RowRule
from memjax.sharding.axes import committed_as, split_columns

TableStates = dict[str, dict[str, Array]]
_MORE_WEIGHT = 32.0
"""By how much the weight of tokens that are not known yet may grow until the last step; at first it is 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of learning facts."""

    rows: int
    """Rows of each table that a batch may change."""
    lr: float
    """Learning rate of the first step; it decays linearly to zero."""
    epochs: int
    """Passes over the facts."""
    batch_size: int
    """Facts in a batch."""
    optimizer: Literal["sgd", "rowwise_adam"] = "rowwise_adam"
    margin: float = math.inf
    """Nats: a token of a fact that is likelier than every other token by more is known, and only the others count in
    the loss. Infinity: all count."""
    replay: int = 0
    """Background texts replayed in a full batch, in proportion in smaller ones, to preserve what the rows held."""
    seed: int = 0
    """Seed of the order of facts and of the choice of replayed texts."""

    def row_optimizer(self, lr: ArrayLike) -> RowOptimizer:
        """The optimizer of the tables with this learning rate."""
        return RowOptimizer(lr, RowRule(kind=self.optimizer, stochastic_rounding=False))


def scores(reads: Int[Array, " n"], background: Int[Array, " n"], texts: int) -> Float[Array, " n"]:
    """tf-idf of every slot: its share of a batch's reads, times log((texts + 1) / (texts that read it + 1))."""
    return reads / jnp.maximum(reads.sum(), 1) * jnp.log((texts + 1) / (background + 1))


def chosen(reads: Int[Array, " n"], background: Int[Array, " n"], texts: int, rows: int) -> Bool[Array, " n"]:
    """Mask of the `rows` slots with the highest scores, except those not read at all or read by every text."""
    best, slots = jax.lax.top_k(scores(reads, background, texts), min(rows, reads.shape[0]))
    return jnp.zeros(reads.shape, bool).at[slots].set(best > 0)


def learn(
    model: Decoder,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    background: Background,
    recipe: Recipe,
    *,
    longest: int,
    known: Sequence[Record] = (),
    after_epoch: Callable[[int, float, Decoder], bool] | None = None,
) -> Decoder:
    """Learns facts by changing rows of the tables and nothing else; returns a new model.

    Texts are split into rows of at most `longest` tokens. `known` holds background texts, some of which are replayed
    in every batch. `after_epoch` is called with the epoch (from 1), its mean loss and the model after it, whose
    tables the next epoch overwrites; returning true stops the learning.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    parts, params, tables = split_decoder(model)
    tables = jax.tree.map(jnp.copy, writable(tables))  # the step donates them
    state = {name: recipe.row_optimizer(recipe.lr).init(table) for name, table in tables.items()}
    state = committed_as(jax.tree.map(split_columns, state), (params, tables))
    counts = {name: jnp.asarray(found) for name, found in background.counts.items()}
    batches = _Batches(
        [windows(pairs_of(fact.wordings, tokenizer), longest) for fact in facts],
        windows(pairs_of(known, tokenizer), longest) if recipe.replay else [],
        recipe,
    )
    run, step = _program(parts.graphdef, recipe, background.texts), 0
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        for batch in batches.of_epoch():
            lr = recipe.lr * (1 - step / (recipe.epochs * len(batches)))
            tables, state, loss = run(params, tables, state, counts, batch, lr, step)
            losses.append(loss)
            step += 1
        mean = float(np.mean(jax.device_get(losses)))
        if after_epoch and after_epoch(epoch, mean, parts.merge(params, tables)):
            break
    return parts.merge(params, tables)


class _Batches:
    """Facts in batches of one shape: first some texts of the background, if there are any, then the new rows."""

    def __init__(self, facts: Sequence[Sequence[Pairs]], known: Sequence[Pairs], recipe: Recipe):
        """`facts` has the rows of each fact, `known` those of the background."""
        self._facts, self._known, self._size = facts, known, min(recipe.batch_size, len(facts))
        # In proportion, so that one fact is not lost among the texts that are replayed with it.
        self._num_known = round_up(-(-recipe.replay * self._size // recipe.batch_size)) if known else 0
        most_new = sum(sorted(map(len, facts), reverse=True)[: self._size])
        width = width_of([*known, *(row for fact in facts for row in fact)])
        self._shape = (self._num_known + round_up(most_new), width)
        self._rng = np.random.default_rng(recipe.seed)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._facts) // self._size)

    def of_epoch(self) -> Iterator[dict[str, Array]]:
        """All facts in a new order, each batch with other texts of the background."""
        numbers = self._rng.permutation(len(self._facts)).tolist()
        for start in range(0, len(numbers), self._size):
            new = [row for number in numbers[start : start + self._size] for row in self._facts[number]]
            known = []
            if self._known:
                drawn = self._rng.integers(len(self._known), size=self._num_known)
                known = [self._known[number] for number in drawn]
            yield batch_of(known + new, self._shape) | {"first_new": jnp.asarray(len(known))}


@functools.lru_cache(maxsize=8)
def _program(graphdef: nnx.GraphDef[Decoder], recipe: Recipe, texts: int) -> Callable[..., Any]:
    """The compiled step, with the model's structure bound, so that calls do not compare it."""
    return jax.jit(functools.partial(_step, graphdef, recipe, texts), donate_argnums=(1, 2))


def _step(
    graphdef: nnx.GraphDef[Decoder],
    recipe: Recipe,
    texts: int,
    params: nnx.State,
    tables: Tables,
    state: TableStates,
    background: dict[str, Array],
    batch: dict[str, Array],
    lr: Array,
    step: Array,
) -> tuple[Tables, TableStates, Array]:
    """Tables and their state after a step, and the mean loss before it."""
    model, optimizer = merge_decoder(graphdef, params, tables), recipe.row_optimizer(lr)
    token_mask = batch["segments"].reshape(-1) > 0
    is_new = batch["segments"] > batch["first_new"]
    weights = batch["loss_mask"] / jnp.maximum(batch["loss_mask"].sum(), 1)

    def objective(model: Decoder, hidden: Array) -> Array:
        if recipe.margin == math.inf:
            return summed_loss(model, hidden, batch["targets"], weights)[0]
        unknown = jnp.where(is_new & ~_leads(model, hidden, batch["targets"], recipe.margin), weights, 0)
        # The fewer are left the more each counts, or the replayed texts would outweigh the last ones to be learned.
        share = jnp.where(is_new, weights, 0).sum() / jnp.maximum(unknown.sum(), jnp.finfo(unknown.dtype).tiny)
        most = 1 + _MORE_WEIGHT * (1 - lr / recipe.lr)
        factors = jnp.where(is_new, unknown * jnp.minimum(share, most), weights)
        return summed_loss(model, hidden, batch["targets"], factors)[0]

    loss, reads, gradients = table_gradients(model, batch, objective)
    ok = jnp.isfinite(loss)
    new_tables, new_state = dict(tables), dict(state)
    for counted, layers in layers_by_table(model.config).items():
        seen = background[counted]
        may_change = chosen(_count(reads, layers, is_new.reshape(-1), seen), seen, texts, recipe.rows)
        for name in tables_of(model.config, layers[0]):
            table, kept = tables[name], []
            for gradient in gradients[name]:
                indices = gradient.without_padding(token_mask, table.shape[0]).indices
                # Reads redirected to a row that does not exist change nothing.
                is_kept = may_change.at[indices].get(mode="fill", fill_value=False)
                kept.append(gradient._replace(indices=jnp.where(is_kept, indices, table.shape[0])))
            new_tables[name], new_state[name] = optimizer.update(name, table, state[name], kept, step=step, ok=ok)
    return new_tables, new_state, loss


def _leads(
    model: Decoder, hidden: Float[Array, "b s dim"], targets: Int[Array, "b s"], margin: float
) -> Bool[Array, "b s"]:
    """Whether each target is likelier than every other token by more than `margin` nats."""

    def of_chunk(logits: Float[Array, "b s vocab"], targets: Int[Array, "b s"]) -> Bool[Array, "b s"]:
        is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
        best, others = (jnp.where(mask, logits, -jnp.inf).max(axis=-1) for mask in (is_target, ~is_target))
        return best - others > margin

    return map_logits(model, of_chunk, jax.lax.stop_gradient(hidden), targets)


def _count(reads: dict[str, SlotReads], layers: Sequence[str], token_mask: Array, like: Array) -> Int[Array, " n"]:
    """Number of reads of each slot in these layers by the tokens of the mask."""
    total = jnp.zeros_like(like)
    for layer in layers:
        total = count_reads(total, jnp.where(token_mask[:, None], reads[layer].indices, like.shape[0]))
    return total
