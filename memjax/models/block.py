"""A decoder block: attention, then a feed-forward layer or what takes its place, and perhaps a memory beside it."""

from functools import partial
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.memory.keys import Lookup
from memjax.memory.layer import MemoryLayer
from memjax.memory.peer import ExpertLookupLayer, ExpertReads, ExpertTaps
from memjax.memory.table import ValueTable
from memjax.models.attention import Attention, KeyValues
from memjax.models.feed_forward import FeedForward
from memjax.models.moe import Experts, Routing
from memjax.models.norm import RMSNorm


class Report(NamedTuple):
    """What a block tells beside its output."""

    lookup: Lookup | ExpertReads | None = None
    """What it read from the tables, if it has a memory or an expert lookup."""
    routing: Routing | None = None
    """What its router said, if it has experts."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mixer(norm(x)); `ModelConfig.kind` says what the mixer is.

    A memory beside the mixer adds its own output.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        implementation: str | None = None,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        """`implementation` names that of the operations of memory and experts, `attention` that of the attention."""
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        memory = config.memory if config.memory and layer in config.memory.layers else None
        norm = partial(RMSNorm, config.dim, epsilon=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.attention_norm = norm(implementation=implementation)
        self.attention = Attention(
            config.dim,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            use_bias=config.attention_bias,
            use_out_bias=config.attention_out_bias,
            head_norm_eps=config.norm_eps if config.head_norm else None,
            rope_theta=None if layer in config.rope_free_layers else config.rope_theta,
            rope_scaling=config.rope_scaling,
            sliding_window=config.sliding_window,
            implementation=attention,
            **kwargs,
        )
        self.mixer_norm = norm(implementation=implementation)
        kind = config.kind(layer)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, **kwargs) if kind == "dense" else None
        self.experts = _experts(config, implementation=implementation, **kwargs) if kind == "experts" else None
        self.memory = _memory_layer(config.dim, memory, implementation=implementation, **kwargs) if memory else None
        self.expert_lookup = (
            _expert_lookup(config, implementation=implementation, **kwargs) if kind == "expert_lookup" else None
        )

    def __call__(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        segments: Int[Array, "b s"] | None = None,
        tables: tuple[ValueTable, ...] = (),
        tap: Float[Array, "t value_dim"] | ExpertTaps | None = None,
        real: Bool[Array, "b s"] | None = None,
        *,
        training: bool = False,
    ) -> tuple[Float[Array, "b s dim"], Report]:
        """The block's output, and what it tells beside it. A memory reads one table, an expert lookup two."""
        x, inputs = self.attention_norm(x)
        x = x + self.attention(inputs, positions, segments)
        return self._mix(x, tables, tap, real, training=training)

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
        tables: tuple[ValueTable, ...] = (),
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """The output for new tokens, and the cache with them; None is an empty one, see `Attention.with_cache`."""
        x, inputs = self.attention_norm(x)
        attended, cache = self.attention.with_cache(inputs, positions, cache)
        return self._mix(x + attended, tables)[0], cache

    def _mix(
        self,
        x: Array,
        tables: tuple[ValueTable, ...],
        tap: Any = None,
        real: Array | None = None,
        *,
        training: bool = False,
    ) -> tuple[Array, Report]:
        (x, inputs), lookup, routing = self.mixer_norm(x), None, None
        if self.feed_forward is not None:
            x = x + self.feed_forward(inputs)
        if self.experts is not None:
            out, routing = self.experts(inputs, real, training=training)
            x = x + out
        if self.memory is not None:
            (table,) = tables
            lookup = self.memory.lookup(inputs)
            x = x + self.memory.combine(inputs, self.memory.read(table, lookup, tap))
        if self.expert_lookup is not None:
            found, (expert_inputs, expert_outputs) = self.expert_lookup.lookup(inputs), tables
            out, lookup = self.expert_lookup.read(inputs, found, expert_inputs, expert_outputs, tap)
            x = x + out
        return x, Report(lookup, routing)


def _experts(config: ModelConfig, **kwargs) -> Experts:
    experts = config.experts
    assert experts is not None
    return Experts(
        config.dim,
        config.expert_dim,
        num_experts=experts.num_experts,
        routing=experts.routing,
        top_k=experts.chosen,
        renormalize=experts.renormalize,
        capacity=experts.capacity,
        **kwargs,
    )


def _memory_layer(dim: int, config: MemoryConfig, **kwargs) -> MemoryLayer:
    return MemoryLayer(
        dim,
        num_keys=config.num_keys,
        num_heads=config.num_heads,
        top_k=config.top_k,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        gate=config.gate,
        output_gate=config.output_gate,
        zero_start=config.placement == "beside",
        qk_norm=config.qk_norm,
        score_scale=config.score_scale,
        **kwargs,
    )


def _expert_lookup(config: ModelConfig, **kwargs) -> ExpertLookupLayer:
    section = config.expert_lookup
    assert section is not None
    return ExpertLookupLayer(
        config.dim,
        num_keys=section.num_keys,
        num_heads=section.num_heads,
        top_k=section.top_k,
        key_dim=section.key_dim,
        qk_norm=section.qk_norm,
        score_scale=section.score_scale,
        **kwargs,
    )
