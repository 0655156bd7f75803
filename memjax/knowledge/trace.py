"""Traces of a prompt: the slots that each token reads, and their contributions to the logit of the next token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.knowledge.reads import LayerRun, run_layers, table_gradients, tables_of, through_norm
from memjax.models.decoder import Decoder
from memjax.models.token_ids import check_ids
from memjax.ops.embedding_dot.api import embedding_dot


class LayerTrace(NamedTuple):
    """Reads of one layer and their contributions."""

    slots: Int[np.ndarray, "t k"]
    weights: Float[np.ndarray, "t k"]
    """Factor of each row in the layer's sum; for an expert, this includes the value of its hidden unit."""
    added: Float[np.ndarray, "t k"]
    """Direct contribution of each slot to the logit of the next token: through the layer's projections and the final
    norm at its actual scale, not through the blocks between."""
    rest: Float[np.ndarray, " t"]
    """Contribution of the layer without any slot: the bias of its projection."""
    total: Float[np.ndarray, " t"]
    """Contribution of the layer's output: the sum of `added` and `rest`."""
    effect: Float[np.ndarray, "t k"]
    """First-order effect of each slot, through all blocks, on the logit of the answer after the prompt."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """A text traced through a model."""

    tokens: list[int]
    """The text, begin token included."""
    place: int
    """Position of the last token of the prompt, after which the answer begins."""
    targets: list[int]
    """The next token at each position; at the last, the answer's last token or, without an answer, the likeliest."""
    logits: Float[np.ndarray, " t"]
    """Logits of the targets."""
    probabilities: Float[np.ndarray, " t"]
    """Probabilities of the targets."""
    guesses: list[list[tuple[int, float]]]
    """The likeliest next tokens at each position, with their probabilities."""
    layers: Mapping[str, LayerTrace]
    """By layer name."""


def trace(model: Decoder, prompt: Sequence[int], answer: Sequence[int] = (), *, guesses: int = 5) -> Trace:
    """Traces a prompt through a model, and explains the logits of an answer or, without one, of the likeliest token.

    Raises:
        ValueError: a token id is outside the vocabulary.
    """
    for name, ids in (("prompt", prompt), ("answer", answer)):
        check_ids(ids, model.config.vocab_size, f"the ids of the {name}")
    tokens = [*prompt, *answer][: len(prompt) + max(0, len(answer) - 1)]
    length = len(tokens)
    # Padded, so that texts of similar length share a compiled program; causal attention never sees padding at the end.
    padded = np.zeros(-(-length // 16) * 16, np.int32)
    padded[:length] = tokens
    row, is_text = jnp.asarray(padded[None]), jnp.arange(len(padded))[None] < length
    graphdef, state = nnx.split(model)
    follows = np.full(len(padded), -1, np.int32)
    follows[: length - 1] = tokens[1:]
    if answer:
        follows[length - 1] = answer[-1]
    # Effects are on the logit of the answer's first token.
    place = len(prompt) - 1
    found = jax.device_get(_traced(graphdef, guesses, state, row, is_text, jnp.asarray(follows), jnp.asarray(place)))
    cut = jax.tree.map(lambda array: array[:length], found)
    effects = jax.device_get(_effects(graphdef, state, row, is_text, jnp.asarray(place), cut["targets"][place]))
    best = zip(cut["best"].tolist(), cut["best_p"].tolist(), strict=True)
    return Trace(
        tokens=tokens,
        place=place,
        targets=cut["targets"].tolist(),
        logits=cut["logits"],
        probabilities=cut["probabilities"],
        guesses=[list(zip(*pair, strict=True)) for pair in best],
        layers={name: LayerTrace(*layer, effect=effects[name][:length]) for name, layer in cut["layers"].items()},
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced(
    graphdef: Any, guesses: int, state: nnx.State, tokens: Array, is_text: Array, follows: Array, place: Array
) -> dict[str, Any]:
    model = nnx.merge(graphdef, state)
    runs, x = run_layers(model, tokens, is_text)
    logits = model.logits(model.norm(x).normed)[0]
    probabilities = jax.nn.softmax(logits, axis=-1)
    best_p, best = jax.lax.top_k(probabilities, min(guesses, logits.shape[-1]))
    targets = jnp.where(follows < 0, jnp.argmax(logits, axis=-1), follows)
    pick = lambda values: jnp.take_along_axis(values, targets[:, None], axis=1)[:, 0]
    # The gradient of each target's logit with respect to the residual stream, at the norm's actual scale.
    directions = through_norm(model.norm, model.output_matrix().T[targets], x[0])
    layers = {
        name: _layer(model.tables[tables_of(model.config, name)[-1]].table, run, directions)
        for name, run in runs.items()
    }
    return {
        "targets": targets,
        "logits": pick(logits),
        "probabilities": pick(probabilities),
        "best": best,
        "best_p": best_p,
        "layers": layers,
    }


def _layer(rows: Any, run: LayerRun, directions: Float[Array, "t dim"]) -> tuple[Array, ...]:
    """The fields of a `LayerTrace` up to `total`."""
    indices, weights = run.reads
    width = rows.shape[1]

    def along(bag: Float[Array, "t d"]) -> Float[Array, " t"]:
        out = run.combine(bag)[0].astype(directions.dtype)
        return jnp.sum(out * directions, axis=-1)

    nothing = jnp.zeros((indices.shape[0], width), directions.dtype)
    # Tokens do not interact in `along`, so the gradient of its sum holds each token's own.
    rest, per_row = along(nothing), jax.grad(lambda bag: along(bag).sum())(nothing)
    added = weights.astype(directions.dtype) * embedding_dot(rows, indices, per_row)
    return indices, weights, added, rest, jnp.sum(run.out[0].astype(directions.dtype) * directions, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _effects(
    graphdef: Any, state: nnx.State, tokens: Array, is_text: Array, place: Array, target: Array
) -> dict[str, Array]:
    """First-order effect of every slot, through all blocks, on the logit of a token at a position, by layer."""
    model = nnx.merge(graphdef, state)
    objective = lambda model, hidden: model.logits(hidden[:, place])[0, target]
    batch = {"tokens": tokens, "segments": is_text.astype(jnp.int32)}
    _, reads, rows = table_gradients(model, batch, objective)
    of_table = {name: iter(gradients) for name, gradients in rows.items()}  # in the order of the layers
    effects = {}
    for layer in reads:
        table = tables_of(model.config, layer)[-1]
        indices, weights, vectors = next(of_table[table])
        effects[layer] = weights * embedding_dot(model.tables[table].table, indices, vectors)
    return effects
