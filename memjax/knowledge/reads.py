"""Reads of the tables by every layer, and their gradients; the only module here that knows the kinds of lookups."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax.config.model import ModelConfig
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.sparse_gradient import row_sparse_value_and_grad
from memjax.memory.table import ValueTable
from memjax.models.block import Block
from memjax.models.decoder import Decoder, DecoderOutput, default_positions, layer_name
from memjax.models.norm import RMSNorm
from memjax.models.parts import split_decoder
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient


class SlotReads(NamedTuple):
    """The slots that a layer read for each token."""

    indices: Int[Array, "t k"]
    weights: Float[Array, "t k"]
    """Factor of each row in the layer's sum; for an expert, this includes the value of its hidden unit."""


class TableGradients(NamedTuple):
    """A value, and its gradients with respect to the tables."""

    value: Float[Array, ""]
    reads: dict[str, SlotReads]
    """By layer name."""
    rows: dict[str, list[RowGradient]]
    """By table name, one for each layer that reads it."""


def tables_of(config: ModelConfig, layer: str) -> tuple[str, ...]:
    """The names of the tables that a layer reads; its output is a sum of rows of the last."""
    number = layers_of(config)[layer]
    return config.lookups[number].tables(number)


def layers_of(config: ModelConfig) -> dict[str, int]:
    """The indices of the blocks that read tables, by layer name."""
    return {layer_name(number): number for number in config.lookups}


def slot_reads(hidden: DecoderOutput) -> dict[str, SlotReads]:
    """The reads whose rows each layer's output sums, by layer name."""
    return {name: _of_sum(reads) for name, reads in hidden.reads.items()}


def _of_sum(reads: tuple[TableRead, ...]) -> SlotReads:
    """The read whose rows a layer's output sums, which is its last."""
    weights = reads[-1].weights
    assert weights is not None
    return SlotReads(reads[-1].indices, weights)


def table_gradients(
    model: Decoder,
    batch: Mapping[str, Array],
    objective: Callable[[Decoder, Float[Array, "b s dim"]], Float[Array, ""]],
) -> TableGradients:
    """The objective for a batch's normed hidden states, and its row gradients; nothing else is differentiated. Padding
    has segment 0 and is at the ends of rows.
    """

    def loss_fn(nothing: dict[str, Array], perturbations: dict[str, Perturbations]) -> tuple[Array, tuple[Any, Any]]:
        hidden = model.hidden(batch["tokens"], perturbations=perturbations, token_mask=batch["segments"] > 0)
        return objective(model, hidden.states), (hidden.reads, slot_reads(hidden))

    perturbations = split_decoder(model)[0].zero_perturbations(batch["tokens"].size)
    (value, reads), _, rows = row_sparse_value_and_grad(loss_fn)({}, perturbations)
    return TableGradients(value, reads, rows)


class LayerRun(NamedTuple):
    """The inputs, reads and output of a layer that reads tables."""

    inputs: Float[Array, "b s dim"]
    reads: SlotReads
    combine: Callable[[Float[Array, "t d"]], Float[Array, "b s dim"]]
    """Maps the sum of rows to the layer's output; affine."""
    out: Float[Array, "b s dim"]


def run_layers(
    model: Decoder, tokens: Int[Array, "b s"], token_mask: Bool[Array, "b s"] | None = None
) -> tuple[dict[str, LayerRun], Float[Array, "b s dim"]]:
    """Runs the model; returns every layer that reads tables, by name, and the residual stream before the final norm."""
    x, positions = model.embedded(tokens), default_positions(tokens, token_mask)
    runs: dict[str, LayerRun] = {}
    for number, block in enumerate(model.blocks):
        tables = model.tables_of(number)
        residual, attention_inputs = block.inputs_of(x, block.attention_norm)
        attended = block.add(residual, block.attention_norm, block.attention(attention_inputs, positions))
        inputs = block.inputs_of(attended, block.mixer_norm).normed
        x, aux = block(x, positions, None, tables)
        if aux.reads:
            runs[layer_name(number)] = _layer_run(block, inputs, tables, _of_sum(aux.reads))
    return runs, x


def _layer_run(block: Block, inputs: Array, tables: tuple[ValueTable, ...], reads: SlotReads) -> LayerRun:
    layer: Any = block.lookup
    plain = lambda inputs, bag: bag.reshape(inputs.shape).astype(inputs.dtype)
    combine, out = functools.partial(getattr(layer, "combine", plain), inputs), layer(inputs, *tables)
    if block.norm_placement == "pre":
        return LayerRun(inputs, reads, combine, out)
    normed = out if block.feed_forward is None else out + block.feed_forward(inputs)
    through = lambda vector: through_norm(block.mixer_norm, vector, normed)
    return LayerRun(inputs, reads, lambda bag: through(combine(bag)), through(out))


def through_norm(norm: RMSNorm, vector: Float[Array, "*t dim"], x: Float[Array, "*t dim"]) -> Float[Array, "*t dim"]:
    """Applies an RMS norm to a component of x, with the scale of x itself."""
    wide = x.astype(accumulator(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.epsilon)
    scale = norm.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return vector.astype(wide.dtype) * inverse * scale
