"""Parameters, arithmetic and bytes of a model, computed from its shapes."""

import dataclasses
import math

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
    config, memory = parts.config, parts.config.memory
    dense = _size(parts.abstract_params)
    rows = len(memory.layers) * memory.picks if memory else 0
    embedding = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.dim
    table = sum(math.prod(leaf.shape) for leaf in parts.abstract_tables.values())
    return ParameterCounts(dense, table, dense - embedding + rows * config.value_dim)


def training_flops_per_token(parts: DecoderParts, sequence_length: int, *, freeze_dense: bool = False) -> int:
    """Floating-point operations of a training step, forward and backward, by token.

    6 for every parameter of a matrix product (the input embedding is none, unless it is the output matrix too);
    attention with the tokens that are seen on average, half of the sequence, or fewer with a sliding window; scores of
    all sub-keys; the sum over the picks and its two gradients. With freeze_dense, less `_spared_by_freezing`.
    """
    config, memory = parts.config, parts.config.memory
    matrices = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.abstract_params) if len(leaf.shape) == 2)
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.dim
    flops = 6 * matrices + 6 * config.num_layers * _attention_products(config, sequence_length)
    if memory:
        search = memory.num_heads * memory.num_keys * memory.key_dim
        read = memory.picks * config.value_dim
        flops += 6 * len(memory.layers) * (search + read)
    return flops - (_spared_by_freezing(parts, sequence_length) if freeze_dense else 0)


def _attention_products(config: ModelConfig, sequence_length: int) -> int:
    """Multiplications of scores and of weighted values in one block, by token."""
    # The first tokens of a row see fewer than the window holds.
    window = min(config.sliding_window or sequence_length, sequence_length)
    seen_twice = 2 * window - window**2 // sequence_length
    return seen_twice * config.num_heads * config.head_width


def _spared_by_freezing(parts: DecoderParts, sequence_length: int) -> int:
    """What a training of the memory layers alone does not compute, by token.

    2 for every frozen parameter, whose weight gradient nobody wants; and 2 more before the first memory layer, where
    the gradient of the activations has nowhere to go, and neither has that of the attention there.
    """
    config, memory = parts.config, parts.config.memory
    if memory is None:
        return 0
    first, spared = memory.layers[0], 4 * (memory.layers[0] + 1) * _attention_products(config, sequence_length)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts.abstract_params):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        is_input = names[0] == "embed" and not config.tie_embeddings
        if len(leaf.shape) != 2 or "memory" in names or is_input:
            continue
        is_before = names[0] == "blocks" and int(names[1]) <= first
        spared += (4 if is_before else 2) * math.prod(leaf.shape)
    return spared


def describe(config: RunConfig, parts: DecoderParts, *, data_axis: int) -> str:
    """The first part of --dry_run: parameters, arithmetic, mesh."""
    counts, memory_axis = count_parameters(parts), config.mesh.memory
    tokens = config.data.batch_size * config.data.sequence_length
    freeze_dense = config.optim.freeze_dense
    flops = training_flops_per_token(parts, config.data.sequence_length, freeze_dense=freeze_dense)
    memory = config.model.memory
    lines = [
        ("parameters", f"{counts.total:,} = {billions(counts.total)}"),
        ("  dense", f"{counts.dense:,}"),
        ("  tables", f"{counts.table:,}" + (f" ({len(memory.pools)} x {memory.num_slots:,} slots)" if memory else "")),
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


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
