"""The language model: embedding, blocks, norm and output; its memory layers read tables that the decoder owns."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config.model import ModelConfig
from memjax.memory.lookup import recording_of
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.table import ValueTable
from memjax.models.attention import KeyValues
from memjax.models.block import Block, BlockAux
from memjax.models.feed_forward import linear
from memjax.models.moe import Routing
from memjax.models.norm import RMSNorm
from memjax.models.remat import Remat, rematerialised
from memjax.models.token_ids import check_ids
from memjax.ops.precision import accumulator, init_in_float32, resolve_dtype
from memjax.ops.shapes import require
from memjax.sharding.axes import gathered, split_tokens
from memjax.sharding.rules import named


class Cache(NamedTuple):
    """Keys and values of every block, and the number of tokens that they hold of each row."""

    blocks: tuple[KeyValues, ...]
    lengths: Int[Array, " b"]


class DecoderOutput(NamedTuple):
    """The hidden states, and the auxiliary outputs of the blocks."""

    states: Float[Array, "b s dim"]
    """The normed residual stream."""
    reads: dict[str, tuple[TableRead, ...]]
    """Reads of the tables, by layer name."""
    routings: dict[str, Routing]
    """Routings of the blocks with experts, by layer name."""


class Decoder(nnx.Module):
    """A Llama-shaped decoder; `ModelConfig.kind` gives the kind of each block."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        implementation: str | None = None,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws all parameters; under `nnx.eval_shape`, nothing is allocated.

        Args:
            config: sizes and types.
            implementation: implementation of the memory and expert operations; None takes the fastest that can run.
            attention: implementation of the attention (`dot_product.IMPLEMENTATIONS`); None as above.
            rngs: source of the `params` key.
        """
        self.config = config
        dtype, param_dtype = resolve_dtype(config.dtype), jnp.dtype(config.param_dtype)
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        std = config.embedding_init_std or config.dim**-0.5
        init = init_in_float32(nnx.initializers.truncated_normal(std, lower=-3.0, upper=3.0))
        # Drawn first, because `DecoderParts.init`, which draws blocks one by one, draws it first too.
        block_key = rngs.params()
        names = named("vocab", "embed")
        self.embed = nnx.Embed(config.vocab_size, config.dim, embedding_init=init, embedding_metadata=names, **kwargs)
        draw = partial(draw_block, config, key=block_key, implementation=implementation, attention=attention)
        self.blocks = nnx.List([draw(layer) for layer in range(config.num_layers)])
        self.norm = RMSNorm(
            config.dim,
            epsilon=config.norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        head = partial(linear, config.dim, config.vocab_size, axes=("embed", "vocab"), **kwargs)
        self.head = None if config.tie_embeddings else head()
        self.tables = nnx.Dict()
        for name, table in config.tables.items():
            self.tables[name] = ValueTable(
                table.num_slots,
                table.width,
                init_scale=table.init_scale,
                dtype=resolve_dtype(table.dtype),
                name=name,
                rngs=rngs,
            )

    def __call__(
        self, tokens: Int[Array, "b s"], positions: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s vocab"]:
        """Logits of the next token at every position, in float32 or wider. For training see `hidden` and `models.loss`.

        Raises:
            ValueError: a token id is outside the vocabulary. Under `jax.jit`, where ids have no values yet, the logits
                at its position and after it are NaN instead; those before it may be.
        """
        return self.logits(self.hidden(tokens, positions).states)

    def hidden(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segments: Int[Array, "b s"] | None = None,
        perturbations: Mapping[str, Perturbations] | None = None,
        remat: Remat = "none",
        *,
        token_mask: Bool[Array, "b s"] | None = None,
        training: bool = False,
    ) -> DecoderOutput:
        """The normed residual stream, and the auxiliary outputs of the blocks, by layer name.

        Args:
            tokens: token ids.
            positions: positions of the tokens in their documents; None counts from 0 in each row.
            segments: document of each token, if several share a row; tokens see only their own document.
            perturbations: zeros added to what is read from tables, by layer name (`DecoderParts.zero_perturbations`);
                their cotangents and the reads make up the tables' gradients.
            remat: what the backward pass recomputes. Results of table reads, and routings, are always kept.
            token_mask: False at padding; None if there is none. Experts that choose tokens skip padding, and rotary
                frequencies that depend on a row's length do not count it.
            training: whether experts choose tokens, in models with expert choice.
        """
        _check_inputs(tokens, positions=positions, segments=segments, token_mask=token_mask)
        check_ids(tokens, self.config.vocab_size, "tokens")
        positions = default_positions(tokens, token_mask) if positions is None else positions
        x = split_tokens(self.embedded(tokens))
        reads: dict[str, tuple[TableRead, ...]] = {}
        routings: dict[str, Routing] = {}

        @rematerialised(remat)
        def run(block: Block, *arguments: Any) -> tuple[Array, BlockAux]:
            return gathered(block, self.embed.dtype)(*arguments, training=training)

        for layer, block in enumerate(self.blocks):
            name = layer_name(layer)
            own, recording = (perturbations or {}).get(name), recording_of(block.lookup)
            if recording is not None:
                own = recording.next_perturbations()
            with jax.named_scope(name):  # for profilers
                x, aux = run(block, x, positions, segments, self.tables_of(layer), own, token_mask)
            x = split_tokens(x)
            if aux.reads:
                reads[name] = aux.reads
            if recording is not None:
                recording.add(aux.reads, type(self).__name__)
            if aux.routing is not None:
                routings[name] = aux.routing
        return DecoderOutput(self.norm(x).normed, reads, routings)

    def logits(self, hidden: Float[Array, "*b dim"]) -> Float[Array, "*b vocab"]:
        """Scores of the vocabulary, in float32 or wider."""
        kernel = self.output_matrix().astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=accumulator(hidden.dtype))

    def output_matrix(self) -> Float[Array, "dim vocab"]:
        """The matrix of the logits, in the type in which it is stored."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `batch` sequences of at most max_length tokens."""
        config = self.config
        shape = (batch, config.kv_heads, max_length, config.head_width)
        zeros = [[jnp.zeros(shape, resolve_dtype(config.dtype)) for _ in range(2)] for _ in range(config.num_layers)]
        return Cache(tuple(KeyValues(*pair) for pair in zeros), jnp.zeros(batch, jnp.int32))

    def with_cache(self, tokens: Int[Array, "b s"], cache: Cache) -> tuple[Float[Array, "b s vocab"], Cache]:
        """Logits at new tokens, which follow each row's cached ones, and the cache including them.

        Token ids must be in the vocabulary. They are checked as by `__call__`, unless a step takes one token per row,
        so that a sampling loop need not wait for its tokens.
        """
        hidden, cache = self.hidden_with_cache(tokens, cache)
        return self.logits(hidden), cache

    def hidden_with_cache(
        self, tokens: Int[Array, "b s"], cache: Cache | None, token_mask: Bool[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b s dim"], Cache]:
        """`with_cache` without the logits, for callers that need them only at some tokens.

        Without a cache, the tokens are the first ones, and the new cache holds just these. Rows may then be padded at
        the end, where token_mask is False. Entries of padding stay in the cache beyond its lengths: they are never
        seen, and new tokens overwrite them.
        """
        if cache is None or tokens.shape[1] > 1:
            check_ids(tokens, self.config.vocab_size, "tokens")
        positions = default_positions(tokens, token_mask)
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        if token_mask is not None:
            lengths = token_mask.sum(axis=1, dtype=jnp.int32)
        if cache is not None:
            positions += cache.lengths[:, None]
            lengths += cache.lengths
        x, blocks = self.embedded(tokens), []
        for layer, block in enumerate(self.blocks):
            with jax.named_scope(layer_name(layer)):
                x, kept = block.with_cache(x, positions, cache and cache.blocks[layer], self.tables_of(layer))
            blocks.append(kept)
        return self.norm(x).normed, Cache(tuple(blocks), lengths)

    def embedded(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s dim"]:
        """The embeddings of tokens; NaN for ids outside the vocabulary."""
        # Indexing would read the last row instead, or count from the end.
        rows = self.embed.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        # Cast after the lookup: casting first would convert the whole matrix, and sum its gradient in 16 bits.
        return rows.astype(self.embed.dtype)

    def tables_of(self, layer: int) -> tuple[ValueTable, ...]:
        """The tables that a block reads."""
        lookup = self.config.lookups.get(layer)
        return tuple(self.tables[name] for name in lookup.tables(layer)) if lookup else ()


def _check_inputs(tokens: Array, **by_token: Array | None) -> None:
    is_batch = getattr(tokens, "ndim", None) == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
    require("Decoder", is_batch, "tokens must be whole numbers [batch, tokens]", tokens=tokens)
    for name, given in by_token.items():
        if given is not None:
            fits = getattr(given, "shape", None) == tokens.shape
            require("Decoder", fits, f"{name} must have the shape of the tokens", tokens=tokens, **{name: given})
            # bfloat16 rounds 257 to 256.
            is_whole = name == "token_mask" or not jnp.issubdtype(given.dtype, jnp.inexact)
            require("Decoder", is_whole, f"{name} must be whole numbers", **{name: given})


def draw_block(
    config: ModelConfig,
    layer: int,
    key: Array,
    *,
    number: int | Array | None = None,
    implementation: str | None = None,
    attention: str | None = None,
) -> Block:
    """A block with fresh parameters. Its index `layer` determines its kind, `number` (None: the same) its draws.

    `key` is the key of all blocks. `number` may be traced, so that blocks of a kind share a program.
    """
    rngs = _BlockRngs(jax.random.fold_in(key, layer if number is None else number))
    dtype, param_dtype = resolve_dtype(config.dtype), jnp.dtype(config.param_dtype)
    kernels = {"implementation": implementation, "attention": attention}
    return Block(config, layer, **kernels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class _BlockRngs(nnx.Rngs):
    """The keys of `nnx.Rngs(params=key)`, counted in Python.

    Flax asks for the sharding of its counter at each draw. While shapes are traced, JAX raises an error that explains
    why there is none, by walking through everything traced so far: that would be quadratic in the number of layers.
    """

    def __init__(self, key: Array):
        self._key, self._drawn = key, 0

    def params(self) -> Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


def layer_name(layer: int) -> str:
    """Name of a block in reads, perturbations and metrics."""
    return f"L{layer}"


def default_positions(tokens: Int[Array, "b s"], token_mask: Bool[Array, "b s"] | None = None) -> Int[Array, "b s"]:
    """0, 1, 2, ... in every row; 0 at padding, because rotary frequencies may depend on the highest position."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return places if token_mask is None else jnp.where(token_mask, places, 0)
