"""Methods of teaching a model facts: table rows, by memjax's own `learn`, or dense parameters as a baseline."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memjax.data.sources.records import Record
from memjax.data.tokenizers.base import Tokenizer
from memjax.knowledge.facts import Fact, batch_of, pairs_of, round_up, width_of
from memjax.knowledge.finetune import Recipe, learn
from memjax.knowledge.slots import Background, count_texts
from memjax.models.decoder import Decoder
from memjax.models.loss import summed_loss
from memjax.models.parts import split_decoder, writable

ROWS = ("sparse", "tf_only", "random_rows", "all_rows")
"""Methods that change only rows of tables."""
DENSE = ("lora", "full")
RANK_TO_ALPHA = 2.0
"""LoRA's alpha divided by its rank."""
WEIGHT_DECAY = 0.1
"""Weight decay of full finetuning, as in arXiv:2510.15103."""


class Method(NamedTuple):
    """How facts are taught."""

    name: str
    """One of ROWS or DENSE."""
    lr: float
    """Learning rate of the first step; it decays linearly to zero."""
    rows: int = 0
    """Rows of a table that a step may change."""
    rank: int = 0
    """Rank of LoRA."""
    optimizer: Literal["sgd", "rowwise_adam"] = "sgd"
    """Optimizer of rows. Dense parameters use AdamW."""
    epochs: int = 1


class Learned(NamedTuple):
    """The result of teaching."""

    model: Decoder
    stored: int
    """Numbers that must be stored to restore this model from the base."""
    rows: int
    """Table rows that have changed."""


def teach(
    model: Decoder,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    background: Background,
    method: Method,
    *,
    longest: int,
    known: Sequence[Record] = (),
    replay: int = 0,
) -> Learned:
    """Teaches a model facts, one per step in all its wordings; does not modify the given model."""
    if method.name in DENSE:
        return _dense(model, tokenizer, facts, method)
    num_slots = next(iter(background.counts.values())).shape[0]
    rows = num_slots if method.name in ("all_rows", "random_rows") else method.rows
    recipe = Recipe(
        rows=rows,
        lr=method.lr,
        epochs=method.epochs,
        batch_size=1,
        optimizer=method.optimizer,
        replay=replay,
    )
    scored_on = _background_for(method, background, model, tokenizer, facts)
    learned = learn(model, tokenizer, facts, scored_on, recipe, longest=longest, known=known)
    changed = changed_rows(model, learned)
    width = next(iter(split_decoder(model)[2].values())).shape[1]
    return Learned(learned, changed * (width + 1), changed)


def changed_rows(model: Decoder, learned: Decoder) -> int:
    """Number of table rows that differ."""
    old, new = (writable(split_decoder(one)[2]) for one in (model, learned))
    return sum(int(jnp.any(old[name] != new[name], axis=1).sum()) for name in old)


def _background_for(
    method: Method, background: Background, model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact]
) -> Background:
    """The background counts that make memjax select rows as the method does."""
    if method.name == "sparse":
        return background
    # Slots read by no text all have the same idf.
    counts = {pool: np.zeros_like(found) for pool, found in background.counts.items()}
    if method.name == "random_rows":
        # Slots read by every text are never selected; mark so many that a fact reads about `rows` others.
        read = _rows_of_a_fact(model, tokenizer, facts)
        rng = np.random.default_rng(0)
        for found in counts.values():
            found[rng.random(len(found)) >= method.rows / read] = background.texts
    return background._replace(counts=counts)


def _rows_of_a_fact(model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact], most: int = 32) -> float:
    """Average number of rows that a fact reads in all its wordings, over at most `most` facts."""
    counted = [count_texts(model, tokenizer, fact.wordings, length=64, batch_size=4).counts for fact in facts[:most]]
    return float(np.mean([sum(int((found > 0).sum()) for found in counts.values()) for counts in counted]))


# ---------------------------------------------------------------------------------------------- dense parameters


Trainable = Any


def _dense(model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact], method: Method) -> Learned:
    parts, params, tables = split_decoder(model)
    tables = writable(tables)
    if method.name == "full":
        trainable, join = (params, tables), lambda trainable, params, tables: trainable
        decay = WEIGHT_DECAY
    else:
        trainable, join = _lora(params, method.rank), _with_lora
        decay = 0.0
    pairs = [pairs_of(fact.wordings, tokenizer) for fact in facts]
    shape = round_up(max(map(len, pairs))), width_of([found for fact in pairs for found in fact])
    steps = method.epochs * len(facts)
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, b2=0.95, weight_decay=decay)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable: Trainable, state: Any, params: Any, tables: Any, batch: dict[str, Array], lr: Array) -> Any:
        def loss(trainable: Trainable) -> Array:
            model = parts.merge(*join(trainable, params, tables))
            hidden = model.hidden(batch["tokens"], token_mask=batch["segments"] > 0).states
            weights = batch["loss_mask"] / jnp.maximum(batch["loss_mask"].sum(), 1)
            return summed_loss(model, hidden, batch["targets"], weights)[0]

        gradients = jax.grad(loss)(trainable)
        state.hyperparams["learning_rate"] = lr
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable = jax.tree.map(jnp.copy, trainable)  # the step donates it
    state, order = optimizer.init(trainable), np.random.default_rng(0)
    for epoch in range(method.epochs):
        for place, number in enumerate(order.permutation(len(facts)).tolist()):
            done = epoch * len(facts) + place
            lr = jnp.asarray(method.lr * (1 - done / steps), jnp.float32)
            trainable, state = step(trainable, state, params, tables, batch_of(pairs[number], shape), lr)
    stored = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    new = parts.merge(*join(trainable, params, tables))
    return Learned(new, stored, changed_rows(model, new))


def _lora(params: Any, rank: int) -> dict[str, tuple[Array, Array]]:
    """Two low-rank factors for every matrix of the blocks, the second initialised to zero (arXiv:2106.09685)."""
    key, found = jax.random.key(0), {}
    for place, leaf in _matrices(params):
        rows, columns = _flat(leaf).shape
        key, drawn = jax.random.split(key)
        found[place] = (jax.random.normal(drawn, (rows, rank)) / rows**0.5, jnp.zeros((rank, columns)))
    return found


def _with_lora(added: dict[str, tuple[Array, Array]], params: Any, tables: Any) -> tuple[Any, Any]:
    def joined(path: Any, leaf: Array) -> Array:
        pair = added.get(jax.tree_util.keystr(path))
        if pair is None:
            return leaf
        return leaf + (RANK_TO_ALPHA * (pair[0] @ pair[1])).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(joined, params), tables


def _matrices(params: Any) -> list[tuple[str, Array]]:
    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    return [(path, leaf) for path, leaf in found if "blocks" in path and leaf.ndim > 1]


def _flat(leaf: Array) -> Array:
    """A parameter as a matrix, with its first axis as rows."""
    return leaf.reshape(leaf.shape[0], -1)
