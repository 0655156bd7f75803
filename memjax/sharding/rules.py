"""Which mesh axes each logical axis of an array is split over: the only place that spells a `PartitionSpec`.

A logical axis names what an axis of an array stands for. Parameters carry theirs as metadata (`named`); other arrays
are laid out by name (`spec`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

DATA, MEMORY, TENSOR = "data", "memory", "tensor"
AXES = (DATA, MEMORY, TENSOR)
"""Of the mesh."""

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # Of activations.
    "batch": (DATA, MEMORY),
    "group": DATA,  # the tokens of a memory group: of the devices that share a table
    # Of dense parameters. Megatron's cuts (arXiv:1909.08053): a block sums activations over `tensor` once after
    # attention and once after its feed-forward layer, and the loss over the vocabulary.
    "embed": None,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "ffn": TENSOR,
    "vocab": TENSOR,
    # Between the projections of a memory layer, and the number that gates its output.
    "value": TENSOR,
    "gate": None,
    # Routed tokens have no fixed order, and kernels of grouped products cannot be cut by XLA.
    "experts": None,
    "expert_ffn": None,
    # Tables and their state. Devices that differ in `tensor` alone read and update the same columns.
    "table_rows": None,
    "table_columns": MEMORY,
}
"""Mesh axes by logical axis; None is replicated."""


def spec(*names: str | None) -> P:
    """The layout of an array whose axes have these names; None stands for an axis that is not split."""
    return P(*(None if name is None else RULES[name] for name in names))


REPLICATED = P()
TOKENS = spec("batch")
"""Arrays with tokens (or sequences) in front."""
MICRO_BATCHES = spec(None, "batch")
"""Batches of shape [micro-batches, sequences, tokens]."""
COLUMNS = spec("table_rows", "table_columns")
"""Tables and their state."""
BAGS = spec("group", "table_columns")
"""Bags before the all-to-all: tokens over `data`, columns over `memory`."""
REPLICA_COLUMNS = spec("group", "table_rows", "table_columns")
"""Arrays with a table's shape behind a leading axis, one for each replica of the table."""
REPLICA_SHARDS = spec("group", "table_columns")
"""Arrays of which every device along `data` and `memory` has its own."""
ONE_PER_DEVICE = P(AXES)
"""Arrays with one element for each device."""


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter: the logical names of its axes."""
    return {"logical_axes": axes}


def is_variable(node: Any) -> bool:
    """Whether the node of a tree is a variable of NNX, whose metadata may name its axes."""
    return isinstance(node, nnx.Variable)


def names_of(node: Any) -> tuple[str | None, ...]:
    """The logical axes of a parameter; none where it names none."""
    return node.get_metadata().get("logical_axes", ()) if is_variable(node) else ()


def parameter_spec(
    shape: Sequence[int], names: Sequence[str | None], sizes: Mapping[str, int], *, fully_sharded: bool = False
) -> P:
    """The layout of a dense parameter, of its gradient, or of an optimizer's state of the same shape.

    Axes are split over `tensor` as the rules say, where the mesh has it and can split them evenly. With fully_sharded
    every matrix is split further, over all of `data` and `memory`, or over one of them where that is all that can be:
    along the first axis that allows it, since pieces of the first axis are contiguous in memory, so that sending them
    takes no transposition. Vectors and scalars are not: they are small, and sending them costs more than keeping them.
    If there are more or fewer names than axes, they are ignored.
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
    """The sharding of some of an array's rows: their number need not divide, so that they are not split."""
    return sharding.update(spec=P(None, *sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding
