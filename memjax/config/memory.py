"""Settings of blocks that read tables: memory layers and PEER."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from memjax.config.checks import block_numbers
from memjax.config.dtype import DType
from memjax.config.section import Positive, Section

MOST_KEYS = 32768
"""Maximum number of sub-keys per half: slot indices are 32-bit, and some are reserved for slots that do not exist."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LookupConfig(Section):
    """Settings of one kind of lookup: blocks that read tables.

    `memjax.memory.kinds` holds the layer of each kind. The name of the kind is that of its field in ModelConfig.
    """

    layers: tuple[int, ...]
    """Blocks (0-based) with a lookup."""
    value_init_scale: float
    """Initial standard deviation of the tables, in units of their width ** -0.5."""
    table_dtype: DType
    """auto: bfloat16 on GPUs, float32 on CPUs."""

    @property
    def num_slots(self) -> int:
        """Rows of a table."""
        raise NotImplementedError

    @property
    def picks(self) -> int:
        """Rows of each table read per token and layer."""
        raise NotImplementedError

    def tables(self, layer: int) -> tuple[str, ...]:
        """Names of the tables that the lookup of block `layer` reads."""
        raise NotImplementedError

    def width(self, dim: int) -> int:
        """Columns of the tables in a model of width `dim`."""
        return dim

    @property
    def replaces_feed_forward(self) -> bool:
        """Whether the lookup replaces the block's feed-forward layer."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProductKeyConfig(LookupConfig):
    """Settings common to all lookups by product keys."""

    num_keys: Positive[int] = 64
    """Sub-keys per half; the table has num_keys squared slots."""
    num_heads: Positive[int] = 2
    """Independent lookups per token; their outputs are summed."""
    top_k: int = 8
    """Slots read per head and token."""
    key_dim: int = 64
    """Width of a query and of a whole key (key_dim / 2 per half)."""
    qk_norm: bool = True
    """Normalise both halves of queries and keys to unit length."""
    score_scale: Positive[float] = 4.0
    """Factor on the scores before the softmax (the paper: 1, without qk_norm)."""
    value_init_scale: Positive[float] = 4.0
    """Initial standard deviation of the table, in units of value_dim ** -0.5 (the paper: 1)."""
    shared_table: bool = True
    """Share one table between all these layers; false gives each layer its own."""
    table_dtype: DType = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""

    def problems(self) -> Iterator[str]:
        if not 1 <= self.top_k <= self.num_keys:
            yield (
                f"top_k={self.top_k} must be in 1..num_keys={self.num_keys}: each half offers only num_keys candidates"
            )
        if self.num_keys > MOST_KEYS:
            yield f"num_keys={self.num_keys} must be at most {MOST_KEYS}: slot numbers are 32-bit"
        if self.key_dim <= 0 or self.key_dim % 2:
            yield f"key_dim={self.key_dim} must be positive and even: it is split into two halves"
        yield from block_numbers(self.layers)

    @property
    def num_slots(self) -> int:
        return self.num_keys**2

    @property
    def picks(self) -> int:
        return self.num_heads * self.top_k

    def tables(self, layer: int) -> tuple[str, ...]:
        return ("shared" if self.shared_table else f"layer_{layer}",)


Gate = Literal["none", "silu"]
Placement = Literal["replace", "parallel"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig(ProductKeyConfig):
    """Memory layers: their blocks, and the sizes of the lookup."""

    PLACE = "model.memory"

    layers: tuple[int, ...] = (1, 2)
    """Blocks (0-based) with a memory layer."""
    placement: Placement = "replace"
    """replace: the memory layer replaces the feed-forward layer (the paper); parallel: the block has both and sums
    them. The memory's output is then scaled by learned numbers that start at zero, so at first it changes nothing."""
    value_dim: Positive[int] | None = None
    """Width of a table row; null: model.dim."""
    gate: Gate = "silu"
    """silu: Memory+, out = W2 (y * silu(W1 x)); none: the plain memory layer."""
    output_gate: bool = False
    """Scale each token's output by a learned number between 0 and 1 (the paper's '+gated')."""

    def width(self, dim: int) -> int:
        return self.value_dim or dim

    @property
    def replaces_feed_forward(self) -> bool:
        return self.placement == "replace"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PEERConfig(ProductKeyConfig):
    """PEER (arXiv:2407.04153): product keys select experts with a single hidden unit, two table rows each."""

    layers: tuple[int, ...] = (1,)
    """Blocks (0-based) with a PEER layer in place of the feed-forward layer."""
    num_keys: Positive[int] = 64
    """Sub-keys per half; there are num_keys squared experts."""
    top_k: int = 8
    """Experts used per head and token."""
    value_init_scale: Positive[float] = 4.0
    """Initial standard deviation of both tables, in units of model.dim ** -0.5 (the paper: 1)."""
    shared_table: bool = True
    """Share the experts between all these layers; false gives each layer its own."""

    def tables(self, layer: int) -> tuple[str, ...]:
        prefix = "experts" if self.shared_table else f"experts_{layer}"
        return f"{prefix}_inputs", f"{prefix}_outputs"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableSizes:
    """A table as described by the lookups that read it."""

    num_slots: int
    """Rows."""
    width: int
    """Columns."""
    picks: int
    """Rows that each lookup reads per token."""
    init_scale: float
    """Initial standard deviation, in units of width ** -0.5."""
    dtype: DType
    readers: tuple[int, ...]
    """Blocks whose lookups read it."""
