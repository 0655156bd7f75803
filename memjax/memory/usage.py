"""Slot usage: how evenly the slots of a table are read."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class UsageStatistics(NamedTuple):
    """Slot statistics over a window of tokens; every field is a scalar."""

    used_fraction: Float[Array, ""]
    """Fraction of slots that were read at least once."""
    dead_fraction: Float[Array, ""]
    """Fraction of slots that were never read."""
    effective_fraction: Float[Array, ""]
    """exp(entropy of the reads) / number of slots: 1 if all slots are read equally often."""
    top1_share: Float[Array, ""]
    """Share of the reads that went to the most popular slot."""


def count_reads(counts: Int[Array, " n"], indices: Int[Array, "*t k"]) -> Int[Array, " n"]:
    """Adds one to the count of each slot for every pick of it; picks of slots from n on are ignored."""
    return counts.at[indices.reshape(-1)].add(1, mode="drop")


def statistics(counts: Int[Array, " n"]) -> UsageStatistics:
    """Statistics of reads per slot; if nothing was read, all are zero but dead_fraction."""
    reads = counts.astype(jnp.float32)
    total = jnp.maximum(reads.sum(), 1)
    share = reads / total
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0))
    used = jnp.mean(reads > 0)
    effective = jnp.where(used > 0, jnp.exp(entropy) / counts.shape[0], 0)
    return UsageStatistics(used, 1 - used, effective, share.max())
