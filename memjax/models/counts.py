"""Parameters, arithmetic and bytes of a model, computed from its shapes."""

import dataclasses
import math
from collections import Counter

import jax

from memjax.config import ModelConfig, RunConfig
from memjax.models.parts import DecoderParts


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    dense: int
    """Everything but the tables."""
    table: int
    """All tables together."""
    active: int
    """What one token uses: the dense parameters, of the input embedding one row, of the tables the rows it reads."""

    @property
    def total(self) -> int:
        """Dense and table parameters."""
        return self.dense + self.table


def count_parameters(parts: DecoderParts) -> ParameterCounts:
    """Parameters of a decoder."""
    config = parts.config
    dense = _size(parts.abstract_params)
    embedding = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.dim
    table = sum(math.prod(leaf.shape) for leaf in parts.abstract_tables.values())
    return ParameterCounts(dense, table, dense - embedding + _read_per_token(config))


def training_flops_per_token(parts: DecoderParts, sequence_length: int) -> int:
    """Floating-point operations of a training step, forward and backward, by token.

    6 for every parameter of a matrix product (the input embedding is none, unless it is the output matrix too);
    attention with the tokens that are seen on average, half of the sequence, or fewer with a sliding window; scores of
    all sub-keys; the sums over the picks (of expert lookups the products with them too), each with its two gradients.
    """
    config = parts.config
    matrices = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.abstract_params) if len(leaf.shape) == 2)
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.dim
    # The first tokens of a row see fewer than the window holds.
    window = min(config.sliding_window or sequence_length, sequence_length)
    seen_twice = 2 * window - window**2 // sequence_length
    flops = 6 * matrices + 6 * config.num_layers * seen_twice * config.num_heads * config.head_width
    search = sum(lookup.num_heads * lookup.num_keys * lookup.key_dim for lookup in config.lookups.values())
    return flops + 6 * (search + _read_per_token(config))


def describe(config: RunConfig, parts: DecoderParts, *, data_axis: int) -> str:
    """The first part of --dry_run: parameters, arithmetic, mesh."""
    counts, memory_axis = count_parameters(parts), config.mesh.memory
    tokens = config.data.batch_size * config.data.sequence_length
    flops = training_flops_per_token(parts, config.data.sequence_length)
    slots = Counter(table.num_slots for table in config.model.tables.values())
    sizes = ", ".join(f"{number} x {num_slots:,} slots" for num_slots, number in slots.items())
    lines = [
        ("parameters", f"{counts.total:,} = {billions(counts.total)}"),
        ("  dense", f"{counts.dense:,}"),
        ("  tables", f"{counts.table:,}" + (f" ({sizes})" if sizes else "")),
        ("  active per token", f"{counts.active:,}"),
        ("training arithmetic", f"{flops:,} FLOPs per token, {flops * tokens:.3g} per step of {tokens:,} tokens"),
        ("mesh", f"data {data_axis} x memory {memory_axis} = {data_axis * memory_axis} devices"),
    ]
    return "\n".join(f"{name:<27} {value}" for name, value in lines)


def billions(count: int) -> str:
    """A count in billions or millions."""
    return f"{count / 1e9:.3f} b" if count >= 1e8 else f"{count / 1e6:.3f} m"


def gigabytes(count: int) -> str:
    """Bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _read_per_token(config: ModelConfig) -> int:
    """Numbers of the tables that a token reads, over all layers."""
    return sum(len(table.readers) * table.picks * table.width for table in config.tables.values())


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
