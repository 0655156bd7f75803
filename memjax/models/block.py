"""A decoder block: attention, then a feed-forward layer, experts or a lookup; a memory may run in parallel."""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.config.model import ModelConfig
from memjax.memory.kinds import KINDS
from memjax.memory.lookup import LookupLayer
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.table import ValueTable
from memjax.models.attention import Attention, KeyValues
from memjax.models.feed_forward import FeedForward
from memjax.models.moe import MoE, Routing
from memjax.models.norm import RMSNorm
from memjax.ops.rms_norm.api import Normed


class BlockAux(NamedTuple):
    """Auxiliary outputs of a block."""

    reads: tuple[TableRead, ...] = ()
    """Reads of its tables, in order."""
    routing: Routing | None = None
    """Output of its router; None without experts."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mixer(norm(x)); `ModelConfig.kind` is the kind of the mixer.

    A memory in parallel to the mixer adds its own output. With `norm_placement: post`, the block is
    x + norm(attention(x)), then x + norm(mixer(x)).
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
        """`implementation` is for the memory and expert operations, `attention` for the attention."""
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kernels: dict[str, Any] = kwargs | {"implementation": implementation}
        self.norm_placement = config.norm_placement
        norm = partial(RMSNorm, config.dim, epsilon=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.attention_norm = norm(implementation=implementation)
        self.attention = Attention(config, layer, implementation=attention, **kwargs)
        self.mixer_norm = norm(implementation=implementation)
        kind = config.kind(layer)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, **kwargs) if kind == "dense" else None
        self.experts = MoE(config.dim, config.expert_dim, config.experts, **kernels) if kind == "experts" else None
        sections = {name: section for name, section in config.lookup_sections.items() if layer in section.layers}
        self.lookup_kind = next(iter(sections), None)
        for name, lookup in KINDS.items():
            setattr(self, name, lookup.build(config.dim, sections[name], **kernels) if name in sections else None)

    @property
    def lookup(self) -> LookupLayer | None:
        """The layer that reads tables, if there is one; it is an attribute named after its kind."""
        return None if self.lookup_kind is None else getattr(self, self.lookup_kind)

    def __call__(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        segments: Int[Array, "b s"] | None = None,
        tables: tuple[ValueTable, ...] = (),
        perturbations: Perturbations | None = None,
        token_mask: Bool[Array, "b s"] | None = None,
        *,
        training: bool = False,
    ) -> tuple[Float[Array, "b s dim"], BlockAux]:
        """The block's output, its reads of the tables, and its routing."""
        with jax.named_scope("attention"):
            x, inputs = self.inputs_of(x, self.attention_norm)
            x = self.add(x, self.attention_norm, self.attention(inputs, positions, segments))
        return self._mix(x, tables, perturbations, token_mask, training=training)

    def with_cache(
        self,
        x: Float[Array, "b s dim"],
        positions: Int[Array, "b s"],
        cache: KeyValues | None,
        tables: tuple[ValueTable, ...] = (),
    ) -> tuple[Float[Array, "b s dim"], KeyValues]:
        """The output for new tokens, and the cache including them; see `Attention.with_cache`."""
        x, inputs = self.inputs_of(x, self.attention_norm)
        attended, cache = self.attention.with_cache(inputs, positions, cache)
        return self._mix(self.add(x, self.attention_norm, attended), tables)[0], cache

    def inputs_of(self, x: Float[Array, "b s dim"], norm: RMSNorm) -> Normed:
        """The residual stream, and the input of the attention or mixer that `norm` belongs to."""
        return norm(x) if self.norm_placement == "pre" else Normed(x, x)

    def add(self, x: Float[Array, "b s dim"], norm: RMSNorm, *outs: Float[Array, "b s dim"]) -> Float[Array, "b s dim"]:
        """The residual stream plus the outputs of the attention or mixer that `norm` belongs to."""
        if self.norm_placement == "pre":
            return sum(outs, start=x)
        return x + norm(sum(outs[1:], start=outs[0])).normed

    def _mix(
        self,
        x: Array,
        tables: tuple[ValueTable, ...],
        perturbations: Perturbations | None = None,
        token_mask: Array | None = None,
        *,
        training: bool = False,
    ) -> tuple[Array, BlockAux]:
        x, inputs = self.inputs_of(x, self.mixer_norm)
        outs, reads, routing = [], (), None
        if self.feed_forward is not None:
            with jax.named_scope("feed_forward"):
                outs.append(self.feed_forward(inputs))
        if self.experts is not None:
            with jax.named_scope("experts"):
                out, routing = self.experts(inputs, token_mask, training=training)
                outs.append(out)
        if self.lookup is not None:
            with jax.named_scope(self.lookup_kind or "lookup"):
                out, reads = self.lookup.with_reads(inputs, *tables, perturbations=perturbations)
                outs.append(out)
        return self.add(x, self.mixer_norm, *outs), BlockAux(reads, routing)
