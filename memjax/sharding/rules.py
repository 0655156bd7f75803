"""The mesh axes over which each logical axis of an array is sharded: the only place that writes a `PartitionSpec`.

A logical axis names the meaning of an array's axis. Parameters carry the names as metadata (`named`); for other arrays,
they are given to `spec`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

DATA, MEMORY, TENSOR = "data", "memory", "tensor"
AXES = (DATA, MEMORY, TENSOR)
"""Axes of the mesh."""

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": (DATA, MEMORY),
    "group": DATA,  # tokens of a memory group, the devices that share a table
    # Dense parameters, as in Megatron (arXiv:1909.08053): a block sums activations over `tensor` once after attention
    # and once after its feed-forward layer, and the loss sums over the vocabulary.
    "embed": None,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "ffn": TENSOR,
    "vocab": TENSOR,
    # The axis between the projections of a memory layer, and that of the number that gates its output.
    "value": TENSOR,
    "gate": None,
    # Routed tokens have no fixed order, and XLA cannot shard the kernels of grouped products.
    "experts": None,
    "expert_ffn": None,
    # Tables and their state. Devices that differ only in `tensor` read and update the same columns.
    "table_rows": None,
    "table_columns": MEMORY,
}
"""Mesh axes by logical axis; None means replicated."""


def spec(*names: str | None) -> P:
    """The sharding of an array whose axes have these names; None is an axis that is not sharded."""
    return P(*(None if name is None else RULES[name] for name in names))


REPLICATED = P()
TOKENS = spec("batch")
"""Arrays whose first axis is tokens (or sequences)."""
MICRO_BATCHES = spec(None, "batch")
"""Batches of shape [micro-batches, sequences, tokens]."""
COLUMNS = spec("table_rows", "table_columns")
"""Tables and their state."""
BAGS = spec("group", "table_columns")
"""Bags before the all-to-all: tokens over `data`, columns over `memory`."""
REPLICA_COLUMNS = spec("group", "table_rows", "table_columns")
"""Arrays with a leading axis before a table's shape, one element for each replica of the table."""
REPLICA_SHARDS = spec("group", "table_columns")
"""Arrays with a separate slice for every device along `data` and `memory`."""
ONE_PER_DEVICE = P(AXES)
"""Arrays with one element for each device."""


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter: the logical names of its axes."""
    return {"logical_axes": axes}


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is an NNX variable, whose metadata may name its axes."""
    return isinstance(node, nnx.Variable)


def names_of(node: Any) -> tuple[str | None, ...]:
    """The logical axes of a parameter; empty if it names none."""
    return node.get_metadata().get("logical_axes", ()) if is_variable(node) else ()


def parameter_spec(
    shape: Sequence[int], names: Sequence[str | None], sizes: Mapping[str, int], *, fully_sharded: bool = False
) -> P:
    """The sharding of a dense parameter, of its gradient, or of an optimizer's state of the same shape.

    Axes are sharded over `tensor` by the rules, if the mesh has it and can divide them evenly. With fully_sharded,
    every matrix is sharded further, over both `data` and `memory`, or over just one of them if both are impossible:
    along the first axis that allows it, since shards of the first axis are contiguous in memory and can be sent without
    a transposition. Vectors and scalars are not: they are small, and sending them costs more than keeping them. Names
    are ignored if there are not as many as axes.
    """
    tensor = sizes.get(TENSOR, 1)
    by_name = names if len(names) == len(shape) else [None] * len(shape)
    entries: list[tuple[str, ...]] = [
        (TENSOR,) if tensor > 1 and name and RULES[name] == TENSOR and length % tensor == 0 else ()
        for name, length in zip(by_name, shape, strict=True)
    ]

    def rest() -> tuple[int, tuple[str, ...]] | None:
        for axes in ((DATA, MEMORY), (DATA,), (MEMORY,)):
            for axis, length in enumerate(shape):
                if length % math.prod(sizes[name] for name in (*entries[axis], *axes)) == 0:
                    return axis, axes
        return None

    if fully_sharded and len(shape) > 1 and (found := rest()):
        entries[found[0]] += found[1]
    while entries and not entries[-1]:
        entries.pop()
    return P(*(entry or None for entry in entries))


def without_first_axis(sharding: Sharding) -> Sharding:
    """The sharding of a part of an array's rows, which are not sharded, since their number need not be divisible."""
    return sharding.update(spec=P(None, *sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding
