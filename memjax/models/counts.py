"""Parameter and FLOP counts of a model, from its shapes."""

import dataclasses
import math
from collections.abc import Iterator

import jax

from memjax.config.model import ModelConfig
from memjax.memory.kinds import KINDS
from memjax.models.parts import DecoderParts


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model."""

    dense: int
    """Everything but the experts and the tables."""
    routers: int
    """Dense parameters of routers, which published totals leave out."""
    experts: int
    """All experts together, without their routers."""
    table: int
    """All tables together."""
    active: int
    """Parameters that one token uses: the dense ones, with just one row of the input embedding, the experts that it
    chooses, and the table rows that it reads."""

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.table


def count_parameters(parts: DecoderParts) -> ParameterCounts:
    """Counts the parameters of a decoder."""
    config = parts.config
    sizes = [(names, shape, math.prod(shape)) for names, shape in _arrays(parts)]
    experts = sum(size for names, shape, size in sizes if _is_expert(names, shape))
    dense = sum(size for _, _, size in sizes) - experts
    routers = sum(size for names, _, size in sizes if "router" in names)
    used = experts * config.experts.chosen // config.experts.num_experts if config.experts else 0
    embedding = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.dim
    table = sum(math.prod(leaf.shape) for leaf in parts.abstract_tables.values())
    return ParameterCounts(dense, routers, experts, table, dense - embedding + used + _read_per_token(config))


@dataclasses.dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations per token of a training step, forward and backward, by purpose."""

    attention: int
    feed_forward: int
    experts: int
    """The experts that process a token, and the router."""
    memory_search: int
    """Queries, and the scores of all sub-keys."""
    memory_read: int
    """The sum over the picks and its two gradients, and the layer's products around it; for PEER layers, also the
    products of token and picks."""
    head: int
    """The logits."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def training_flops(parts: DecoderParts, sequence_length: int, *, freeze_dense: bool = False) -> FlopCounts:
    """The arithmetic of training, per token.

    6 for every parameter in the matrix products of a token (the input embedding is in none, unless it is tied to the
    output); attention over the tokens that are visible on average: half of the sequence, or fewer with a sliding
    window.

    With freeze_dense, 2 fewer for every frozen parameter, which has no weight gradient, and another 2 fewer up to the
    first lookup, below which neither activations nor attention have a gradient.
    """
    config, experts = parts.config, parts.config.experts
    frozen_blocks = min(config.lookups) + 1 if config.lookups and freeze_dense else 0
    flops = dict.fromkeys((field.name for field in dataclasses.fields(FlopCounts)), 0)
    for names, shape in _arrays(parts):
        by_parameter = 6
        if frozen_blocks and not KINDS.keys() & set(names):
            by_parameter = 2 if names[0] == "blocks" and int(names[1]) < frozen_blocks else 4
        if _is_expert(names, shape):
            assert experts is not None
            by_token = experts.capacity_factor if experts.routing == "expert_choice" else experts.top_k
            flops["experts"] += round(by_parameter * by_token * math.prod(shape) / experts.num_experts)
        elif len(shape) == 2 and (group := _group(names, tied=config.tie_embeddings)):
            flops[group] += by_parameter * math.prod(shape)
    blocks = 6 * config.num_layers - 4 * frozen_blocks
    flops["attention"] += blocks * _attention_products(config, sequence_length)
    for kind, section in config.lookup_sections.items():
        flops["memory_search"] += 6 * len(section.layers) * KINDS[kind].search_products(section)
    flops["memory_read"] += 6 * _read_per_token(config)
    return FlopCounts(**flops)


def _attention_products(config: ModelConfig, sequence_length: int) -> int:
    """Multiplications per token for scores and weighted values in one block."""
    # The first tokens of a row see fewer tokens than the window holds.
    window = min(config.sliding_window or sequence_length, sequence_length)
    seen_twice = 2 * window - window**2 // sequence_length
    return seen_twice * config.num_heads * config.head_width


def _group(names: tuple[str, ...], *, tied: bool) -> str | None:
    """The field of FlopCounts that a matrix belongs to; None for an input embedding."""
    if names[0] == "blocks":
        if names[2] in KINDS:
            return "memory_search" if "keys" in names else "memory_read"
        return names[2]
    return "head" if names[0] == "head" or tied else None


def _is_expert(names: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array holds a matrix for each expert; routers do not."""
    return "experts" in names and len(shape) == 3


def _arrays(parts: DecoderParts) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name, as parts of a path, and shape of every parameter outside the tables."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts.abstract_params):
        yield tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)), leaf.shape


def _read_per_token(config: ModelConfig) -> int:
    """Table elements that a token reads, over all layers."""
    return sum(len(table.readers) * table.picks * table.width for table in config.tables.values())
