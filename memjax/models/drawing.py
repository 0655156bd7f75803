"""A decoder's first parameters, drawn by a program that is compiled in seconds.

Every draw of a matrix is a long piece of code to a compiler, and a decoder of 32 blocks has hundreds. But blocks of one
kind differ in nothing but their keys, so each kind is drawn by one loop. The numbers are those of `Decoder` itself.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from memjax.config import ModelConfig
from memjax.memory.table import TableRows
from memjax.models.block import Block
from memjax.models.decoder import Decoder, resolve_dtype

BEFORE_BLOCKS = 1
"""Keys that a decoder takes before those of its blocks: the embedding's."""


class _Stream(nnx.RngStream):
    """Keys from a given number on, and how many were taken."""

    def __init__(self, key: Array, first: Array | int):
        super().__init__(key, tag="default")
        self.count[...] = jnp.asarray(first, self.count[...].dtype)
        self.taken = 0

    def __call__(self) -> Array:
        self.taken += 1
        return super().__call__()


def draw_decoder(config: ModelConfig, key: Array) -> tuple[nnx.State, nnx.State]:
    """Parameters and tables of `Decoder(config, rngs=nnx.Rngs(key))`, bit for bit.

    To be traced by `jax.jit`, which leaves out what the decoder draws by itself and a loop draws as well.
    """
    _, tables, params = nnx.split(Decoder(config, rngs=nnx.Rngs(key)), TableRows, nnx.Param)
    blocks = params["blocks"]
    kinds: dict[Any, list[int]] = {}
    for layer in range(config.num_layers):
        leaves, structure = jax.tree.flatten(blocks[layer])
        kinds.setdefault((structure, *(leaf.shape for leaf in leaves)), []).append(layer)
    taken = [0] * config.num_layers
    for layers in kinds.values():
        of_kind = _keys_taken(config, layers[0])
        for layer in layers:
            taken[layer] = of_kind
    for layers in kinds.values():
        if len(layers) > 1:
            firsts = [BEFORE_BLOCKS + sum(taken[:layer]) for layer in layers]
            drawn = _draw_alike(config, key, layers[0], firsts)
            for place, layer in enumerate(layers):
                blocks[layer] = jax.tree.map(lambda stacked, place=place: stacked[place], drawn)
    return params, tables


def _draw_alike(config: ModelConfig, key: Array, layer: int, firsts: Sequence[int]) -> nnx.State:
    """Parameters, stacked, of blocks like that of the layer, each with the keys from its number on."""

    def draw(first: Array) -> nnx.State:
        return nnx.state(_block(config, layer, _Stream(key, first)), nnx.Param)

    return jax.lax.map(draw, jnp.asarray(firsts))


def _keys_taken(config: ModelConfig, layer: int) -> int:
    """How many keys a block takes."""
    taken = 0

    def draw() -> None:
        nonlocal taken
        stream = _Stream(jax.random.key(0), 0)
        _block(config, layer, stream)
        taken = stream.taken

    jax.eval_shape(draw)
    return taken


def _block(config: ModelConfig, layer: int, stream: _Stream) -> Block:
    rngs = nnx.Rngs(jax.random.key(0))
    rngs.default = stream  # pyright: ignore[reportAttributeAccessIssue]  # streams are attributes by name
    dtype, param_dtype = resolve_dtype(config.dtype), jnp.dtype(config.param_dtype)
    return Block(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
