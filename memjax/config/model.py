"""The settings of a model, as frozen dataclasses: its sizes, and the kind of each block."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from memjax.config.checks import block_numbers
from memjax.config.dtype import DType
from memjax.config.memory import LookupConfig, MemoryConfig, PEERConfig, TableSizes
from memjax.config.section import NotNegative, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig(Section):
    """Mixture of experts: a block has several feed-forward layers, and each token uses a few of them."""

    layers: tuple[int, ...] | None = None
    """Blocks (0-based) with experts; null: all blocks that are not in another list."""
    num_experts: Positive[int] = 8
    """Experts per block."""
    ffn_dim: Positive[int] | None = None
    """Hidden width of an expert; null: model.ffn_dim."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """token_choice: each token chooses its top_k best experts, and no token is dropped; expert_choice: in training each
    expert chooses its best tokens, the same number for all experts (arXiv:2202.09368); outside training each token
    chooses its best expert."""
    top_k: int = 2
    """Experts per token (token_choice)."""
    renormalize: bool = False
    """Normalise the weights of a token's experts to sum to 1 (token_choice, top_k above 1)."""
    capacity_factor: float = 1.0
    """Average number of experts per token in training (expert_choice)."""
    aux_loss_weight: NotNegative[float] = 0.01
    """Weight of the load-balancing loss, which is 1 if tokens are spread evenly over the experts, and higher otherwise.
    With expert_choice it measures what the tokens' own choices would give."""
    z_loss_weight: NotNegative[float] = 0.001
    """Weight of the router's z-loss, which keeps its logits small."""

    def problems(self) -> Iterator[str]:
        by_token = self.routing == "token_choice"
        if by_token and not 1 <= self.top_k <= self.num_experts:
            yield f"top_k={self.top_k} must be in 1..num_experts={self.num_experts}"
        if self.renormalize and (self.top_k == 1 or not by_token):
            yield (
                f"renormalize={self.renormalize} needs routing=token_choice and top_k above 1, not {self.routing} and "
                f"{self.top_k}: a single weight would always be 1, and the router would have no gradient"
            )
        if not by_token and not 0 < self.capacity_factor <= self.num_experts:
            yield (f"capacity_factor={self.capacity_factor} must be above 0 and at most num_experts={self.num_experts}")
        if self.layers is not None:
            yield from block_numbers(self.layers)

    @property
    def chosen(self) -> int:
        """Number of experts that a token chooses; with expert_choice, only outside training."""
        return self.top_k if self.routing == "token_choice" else 1


RopeScalingKind = Literal["llama3", "linear", "dynamic", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig(Section):
    """Slower rotary frequencies, which extend the context beyond the length of pretraining."""

    kind: RopeScalingKind = "llama3"
    """llama3: as in Llama 3.1; linear: all frequencies by one factor; dynamic: a larger base for rows beyond
    original_length (NTK); yarn: slow frequencies only, and sharper attention (arXiv:2309.00071); longrope: a factor per
    frequency, with one list for short rows and one for rows beyond original_length (arXiv:2402.13753)."""
    factor: Positive[float] = 8.0
    """Divisor of slow frequencies: the factor by which texts may become longer."""
    low_freq_factor: Positive[float] = 1.0
    """Frequencies with fewer turns than this within original_length are slow (llama3)."""
    high_freq_factor: float = 4.0
    """Frequencies with more turns than this within original_length are unchanged; those between are interpolated
    (llama3)."""
    original_length: Positive[int] = 8192
    """Context length of pretraining, in tokens."""
    beta_fast: Positive[float] = 32.0
    """Frequencies with more turns than this within original_length are unchanged (yarn)."""
    beta_slow: Positive[float] = 1.0
    """Frequencies with fewer turns than this within original_length are divided by factor (yarn)."""
    truncate: bool = True
    """Round the borders between fast and slow frequencies to whole dimensions (yarn)."""
    attention_factor: Positive[float] | None = None
    """Factor on rotated queries and keys; null computes it from the other settings (yarn and longrope)."""
    mscale: Positive[float] | None = None
    """With mscale_all_dim, another way to set that factor (yarn)."""
    mscale_all_dim: Positive[float] | None = None
    """See mscale (yarn)."""
    short_factor: tuple[float, ...] = ()
    """Divisor of each frequency in rows of up to original_length tokens (longrope)."""
    long_factor: tuple[float, ...] = ()
    """Divisor of each frequency in longer rows (longrope)."""

    def problems(self) -> Iterator[str]:
        if self.high_freq_factor <= self.low_freq_factor:
            yield f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
        if self.original_length == 1:
            yield f"original_length={self.original_length} must be at least 2"
        if self.beta_fast < self.beta_slow:
            yield f"beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}"
        is_longrope = self.kind == "longrope"
        if bool(self.short_factor) != is_longrope or bool(self.long_factor) != is_longrope:
            yield f"kind={self.kind} needs short_factor and long_factor, other kinds must leave them empty"
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if any(factor <= 0 for factor in factors):
                yield f"{name} must hold positive numbers"


QKNorm = Literal["none", "per_head", "all_heads"]
MOST_LAYERS = 1000
"""Maximum number of blocks, about ten times that of the deepest language models."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """The decoder: the Llama architecture, with memory layers or experts in place of some feed-forward layers."""

    PLACE = "model"

    dim: Positive[int] = 64
    """Width of the residual stream."""
    num_layers: Positive[int] = 3
    """Number of blocks."""
    num_heads: Positive[int] = 2
    """Attention query heads."""
    num_kv_heads: Positive[int] | None = None
    """Key and value heads (grouped-query attention); null: num_heads."""
    head_dim: Positive[int] | None = None
    """Width of an attention head; null: dim / num_heads."""
    attention_bias: bool = False
    """Use biases in the attention projections."""
    attention_out_bias: bool | None = None
    """Use a bias in the attention output projection; null: as attention_bias (Qwen 2: false)."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys before rotation: per head (Qwen 3), or over all heads
    (OLMo 2)."""
    ffn_dim: Positive[int] = 96
    """Hidden width of the feed-forward layers."""
    vocab_size: Positive[int] = 2048
    """Rows of the embedding. A tokenizer with more tokens is refused; one trained by the run stays within it."""
    rope_theta: Positive[float] = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Slower rotary frequencies for longer texts; null: none."""
    rope_free_layers: tuple[int, ...] = ()
    """Blocks (0-based) whose attention has no rotary positions (SmolLM 3)."""
    sliding_window: Positive[int] | None = None
    """Number of tokens that a token attends to, including itself; null: all earlier ones of its document."""
    norm_eps: Positive[float] = 1e-5
    """Added to the mean square in every RMSNorm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Where RMSNorm is applied. pre: to the inputs of attention and feed-forward layers; post: to their outputs
    (OLMo 2)."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output matrix."""
    embedding_init_std: Positive[float] | None = 1.0
    """Initial standard deviation of the embedding; null: dim ** -0.5 (the paper)."""
    dtype: DType = "auto"
    """Type of activations and matrix products; auto: bfloat16 on GPUs, float32 on CPUs."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the dense parameters."""
    memory: MemoryConfig | None = dataclasses.field(default_factory=MemoryConfig)
    """Memory layers; null: none."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of feed-forward layers; null: none."""
    peer: PEERConfig | None = None
    """PEER: experts looked up like memory slots, in place of feed-forward layers; null: none."""

    def problems(self) -> Iterator[str]:
        if self.head_dim is None and self.num_heads > 0 and (self.dim % self.num_heads or self.head_width % 2):
            yield (
                f"num_heads={self.num_heads} must divide dim={self.dim} into heads of an even width, or head_dim be set"
            )
        if self.head_dim is not None and self.head_dim % 2:
            yield f"head_dim={self.head_dim} must be even: rotary positions turn pairs of numbers"
        if self.num_layers > MOST_LAYERS:
            yield f"num_layers={self.num_layers} must be at most {MOST_LAYERS}: every block is compiled separately"
        if self.kv_heads > 0 and self.num_heads % self.kv_heads:
            yield f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}"
        free = list(self.rope_free_layers)
        if free != sorted(set(free)) or not all(0 <= layer < self.num_layers for layer in free):
            yield f"rope_free_layers={free} must rise and lie within 0..{self.num_layers - 1}"
        yield from self._rope_problems()
        if self.num_layers <= MOST_LAYERS:
            yield from self._kind_problems()

    def _rope_problems(self) -> Iterator[str]:
        """Problems with rope_scaling: frequencies that are all equal, or a wrong number of factors."""
        scaling, half = self.rope_scaling, self.head_width // 2 if self.num_heads > 0 else 0
        if scaling is None:
            return
        if scaling.kind == "yarn" and self.rope_theta == 1:
            yield "rope_theta=1.0 must be another number with rope_scaling.kind=yarn: all frequencies would be one"
        for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
            if factors and len(factors) != half:
                yield (
                    f"rope_scaling.{name} holds {len(factors)} numbers, must hold {half}: one for each pair of a head"
                )

    def _kind_problems(self) -> Iterator[str]:
        """Blocks that do not exist or are listed twice, and experts without a block."""
        named: dict[int, str] = {}
        for section, layers in self._named_layers().items():
            shown = f"{section}.layers={list(layers)}"
            if any(not 0 <= layer < self.num_layers for layer in layers):
                yield (
                    f"{shown} must lie in 0..{self.num_layers - 1}: the model has num_layers={self.num_layers} blocks"
                )
            for other in {named[layer] for layer in layers if layer in named}:
                twice = [layer for layer in layers if named.get(layer) == other]
                yield (
                    f"{shown} and {other}.layers both name {twice}: a block is of one kind; take it out of one list, "
                    f"or set model.{other} to null"
                )
            named |= dict.fromkeys(layers, section)
        if self.experts and not self.layers_of("experts"):
            yield (
                "experts.layers=null finds no block that is not in another list; shorten the other lists, "
                "or set model.memory to null"
            )

    def _named_layers(self) -> dict[str, tuple[int, ...]]:
        """The blocks that each section lists."""
        named = {kind: section.layers for kind, section in self.lookup_sections.items()}
        return named | ({"experts": self.experts.layers or ()} if self.experts else {})

    def kind(self, layer: int) -> str:
        """The kind of a block: `dense`, or the section that replaces its feed-forward layer."""
        for kind, layers in self._named_layers().items():
            if layer in layers:
                section = self.lookup_sections.get(kind)
                return kind if section is None or section.replaces_feed_forward else "dense"
        return "experts" if self.experts and self.experts.layers is None else "dense"

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """The blocks of a kind."""
        return tuple(layer for layer in range(self.num_layers) if self.kind(layer) == kind)

    @property
    def lookup_sections(self) -> dict[str, LookupConfig]:
        """The sections of the lookups that the model has, by kind."""
        sections = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {kind: section for kind, section in sections.items() if isinstance(section, LookupConfig)}

    @property
    def lookups(self) -> dict[int, LookupConfig]:
        """The lookup section of each block that has one, grouped by kind."""
        return {layer: section for section in self.lookup_sections.values() for layer in section.layers}

    @property
    def tables(self) -> dict[str, TableSizes]:
        """The tables by name."""
        readers: dict[str, list[int]] = {}
        for layer, lookup in self.lookups.items():
            for name in lookup.tables(layer):
                readers.setdefault(name, []).append(layer)
        return {name: self._table_sizes(tuple(layers)) for name, layers in readers.items()}

    def _table_sizes(self, readers: tuple[int, ...]) -> TableSizes:
        lookup = self.lookups[readers[0]]
        return TableSizes(
            num_slots=lookup.num_slots,
            width=lookup.width(self.dim),
            picks=lookup.picks,
            init_scale=lookup.value_init_scale,
            dtype=lookup.table_dtype,
            readers=readers,
        )

    @property
    def rotates_by_length(self) -> bool:
        """Whether rotary frequencies depend on the length of a text."""
        return self.rope_scaling is not None and self.rope_scaling.kind in ("dynamic", "longrope")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def expert_dim(self) -> int:
        """Hidden width of an expert."""
        return (self.experts and self.experts.ffn_dim) or self.ffn_dim
