"""Splits a Decoder into dense parameters and tables, which are trained differently, and merges them back."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from memjax.config.model import ModelConfig
from memjax.errors import CheckpointError
from memjax.memory.kinds import KINDS
from memjax.memory.read import Perturbations, zero_perturbation
from memjax.memory.table import TableRows
from memjax.models.decoder import Decoder, draw_block, layer_name
from memjax.ops.table import Table

Tables = dict[str, Float[Array, "n d"]]
"""Rows of every table, by name."""
AnyTables = Mapping[str, Table | Float[Array, "n d"]]
"""Every table, by name: an array, or a read-only table."""


@dataclasses.dataclass(frozen=True)
class DecoderParts:
    """The structure of a decoder without its arrays; `merge` adds dense parameters and tables to make a decoder.

    Merging costs nothing under `jax.jit` and copies nothing outside it.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef[Decoder]
    abstract_params: nnx.State
    """Shapes of the dense parameters."""
    abstract_tables: dict[str, Table | jax.ShapeDtypeStruct]
    """Shapes of the tables."""

    @classmethod
    def of(
        cls, config: ModelConfig, *, implementation: str | None = None, attention: str | None = None
    ) -> "DecoderParts":
        """The parts of the decoder that a config describes; nothing is allocated."""
        kernels = {"implementation": implementation, "attention": attention}
        model = nnx.eval_shape(lambda: Decoder(config, **kernels, rngs=nnx.Rngs(0)))
        graphdef, tables, params = nnx.split(model, TableRows, nnx.Param)
        return cls(config, graphdef, params, _tables_of(tables))

    def init(self, key: Array, shardings: tuple[Any, Any] | None = None) -> tuple[nnx.State, Tables]:
        """Freshly drawn dense parameters and tables, equal to those of `Decoder(config, rngs=nnx.Rngs(key))`.

        XLA takes seconds to compile the draws of a block, so one program is compiled for each kind of block, not for
        each block. Without shardings, JAX decides where arrays are placed.
        """
        without_blocks, blocks = None, None
        if shardings is not None:
            params, tables = shardings
            without_blocks, blocks = (_without_blocks(params), tables), params["blocks"]
        rest, drawn_tables = jax.jit(self._draw_rest, out_shardings=without_blocks)(key)
        leaves = jax.tree.leaves({**rest, "blocks": self._draw_blocks(nnx.Rngs(key).params(), blocks)})
        return jax.tree.unflatten(jax.tree.structure(self.abstract_params), leaves), drawn_tables

    def _draw_rest(self, key: Array) -> tuple[nnx.State, Tables]:
        """Draws all but the blocks."""
        _, tables, params = nnx.split(Decoder(self.config, rngs=nnx.Rngs(key)), TableRows, nnx.Param)
        return _without_blocks(params), _tables_of(tables)

    def _draw_blocks(self, key: Array, shardings: Any | None) -> dict[int, nnx.State]:
        """Draws every block's parameters, by index."""
        programs, blocks = {}, {}
        for layer, abstract in self.abstract_params["blocks"].items():
            leaves, structure = jax.tree.flatten(abstract)
            kind = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            if kind not in programs:
                where = None if shardings is None else shardings[layer]
                programs[kind] = jax.jit(partial(self._draw_block, layer), out_shardings=where)
            blocks[layer] = programs[kind](key, layer)
        return blocks

    def _draw_block(self, layer: int, key: Array, number: int | Array) -> nnx.State:
        """Draws the block with index `number`, which is of the same kind as that with index `layer`."""
        return nnx.state(draw_block(self.config, layer, key, number=number), nnx.Param)

    def zero_perturbations(self, num_tokens: int) -> dict[str, Perturbations]:
        """The perturbations of every lookup, by layer name, for a batch of num_tokens tokens."""
        return {
            layer_name(layer): tuple(
                zero_perturbation(read, num_tokens, section.picks, self.abstract_tables[table])
                for read, table in zip(KINDS[kind].layer.READS, section.tables(layer), strict=True)
            )
            for kind, section in self.config.lookup_sections.items()
            for layer in section.layers
        }

    def merge(self, params: nnx.State, tables: AnyTables) -> Decoder:
        """The decoder with the given arrays."""
        return merge_decoder(self.graphdef, params, tables)


def _without_blocks(params: nnx.State) -> nnx.State:
    return nnx.State({name: part for name, part in params.items() if name != "blocks"})


def merge_decoder(graphdef: nnx.GraphDef[Decoder], params: nnx.State, tables: AnyTables) -> Decoder:
    """The decoder with the structure of graphdef and the given arrays."""
    rows = {name: {"rows": TableRows(table)} for name, table in tables.items()}
    return nnx.merge(graphdef, params, nnx.State({"tables": rows} if rows else {}))


def split_decoder(model: Decoder) -> tuple[DecoderParts, nnx.State, AnyTables]:
    """The structure of a decoder, its dense parameters, and its tables."""
    graphdef, tables, params = nnx.split(model, TableRows, nnx.Param)
    arrays = _tables_of(tables)
    abstract_params, abstract_tables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, arrays)
    )
    return DecoderParts(model.config, graphdef, abstract_params, abstract_tables), params, arrays


def writable(tables: AnyTables, source: str = "the model") -> Tables:
    """The tables, which are all arrays; CheckpointError if one is read-only."""
    arrays = {}
    for name, table in tables.items():
        if isinstance(table, Table):
            raise CheckpointError(
                f"{source}: table {name} is read-only ({table.describe()}); use the run that it was made from, without "
                "table_format and table_place"
            )
        arrays[name] = table
    return arrays


def _tables_of(state: nnx.State) -> dict:
    """The tables of a split state, by name."""
    tables = nnx.to_pure_dict(state).get("tables", {})
    return {name: table["rows"] for name, table in tables.items()}
