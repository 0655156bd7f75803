"""The kinds of lookups that a model's blocks may have, by the name of their section in the config.

A new kind needs a section (a `LookupConfig` and a field of `ModelConfig`), a layer (a `LookupLayer`) and an entry here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from memjax.config.memory import LookupConfig, MemoryConfig, PEERConfig
from memjax.memory.layer import MemoryLayer
from memjax.memory.lookup import LookupLayer
from memjax.memory.peer import PEERLayer


class TokenBytes(NamedTuple):
    """Bytes per token and layer of a training step, and the number of scores."""

    activations: int
    """Activations around the lookup; kept without rematerialisation."""
    products: int
    """The part of `activations` that is the output of matrix products."""
    read: int
    """Results of the lookup; always kept."""
    gradient: int
    """The row gradients."""
    scores: int
    """Scores that the search compares, in float32 or wider: a count, not bytes."""


class LookupKind(NamedTuple):
    """What differs between kinds; sections are instances of `config`."""

    config: type[LookupConfig]
    layer: type[LookupLayer]
    """Built as layer(dim, section, dtype=, param_dtype=, implementation=, rngs=)."""
    title: str
    """Start of its line in the summary of a run; formatted with the number of slots."""
    noun: str
    """Its name in descriptions of models."""
    search_products: Callable[[Any], int]
    """(section) -> multiplications per token, other than those with parameters of linear layers."""
    token_bytes: Callable[[Any, int, int, int], TokenBytes]
    """(section, dim, bytes of an activation, bytes of a table element) -> an estimate of a step's bytes."""

    def build(self, dim: int, section: LookupConfig, **kwargs: Any) -> LookupLayer:
        layer: Any = self.layer
        return layer(dim, section, **kwargs)


def _memory_bytes(section: MemoryConfig, dim: int, width: int, table_width: int) -> TokenBytes:
    queries, columns, is_gated = section.num_heads * section.key_dim, section.width(dim), section.gate == "silu"
    bag = columns * table_width
    return TokenBytes(
        activations=(queries + (3 if is_gated else 1) * columns) * width,
        products=(queries + is_gated * columns) * width,
        read=section.picks * 12 + bag,
        gradient=section.picks * 8 + bag,
        scores=_half_scores(section),
    )


def _peer_bytes(section: PEERConfig, dim: int, width: int, table_width: int) -> TokenBytes:
    queries, vectors = section.num_heads * section.key_dim * width, dim * (width + table_width)
    # Per pick: index, score, weight, its product with the token, and the activation of that product.
    read, gradient = section.picks * 20 + vectors, section.picks * 12 + vectors
    return TokenBytes(queries, queries, read, gradient, _half_scores(section))


def _half_scores(section: MemoryConfig | PEERConfig) -> int:
    return section.num_heads * 2 * section.num_keys


def _search_products(section: MemoryConfig | PEERConfig) -> int:
    return section.num_heads * section.num_keys * section.key_dim


KINDS: dict[str, LookupKind] = {
    "memory": LookupKind(MemoryConfig, MemoryLayer, "memory     {:,} slots", "memory", _search_products, _memory_bytes),
    "peer": LookupKind(PEERConfig, PEERLayer, "peer       {:,} experts", "PEER", _search_products, _peer_bytes),
}
"""The kinds, by the name of their section in `ModelConfig`."""
