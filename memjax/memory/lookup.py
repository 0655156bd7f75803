"""Base class of the layers that read tables."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from memjax.memory.read import Perturbations, ReadKind, TableRead, zero_perturbation
from memjax.memory.table import ValueTable


class Recording(nnx.Module):
    """Supplies perturbations and records reads; `memjax.value_and_grad` attaches it to layers while it runs a model."""

    def __init__(self, perturbations: tuple[Perturbations, ...]):
        """Takes the perturbations of each call of the layer; none as long as their shapes are unknown."""
        self.perturbations = nnx.Perturbation(perturbations)
        self.reads: nnx.Variable[tuple[tuple[TableRead, ...], ...]] = nnx.Intermediate(())
        """Reads of each call, in order."""

    def next_perturbations(self) -> Perturbations | None:
        """The perturbations of the layer's next call; None in the first pass, which finds their shapes."""
        perturbations = self.perturbations.get_value()
        return perturbations[len(self.reads.get_value())] if perturbations else None

    def add(self, reads: tuple[TableRead, ...], layer: str) -> None:
        """Records the reads of a call; `layer` is the name of the class, for the message.

        Raises:
            ValueError: the call is inside a JAX transformation that closes over the layer.
        """
        try:
            self.reads.set_value((*self.reads.get_value(), reads))
        except TraceContextError as error:
            raise ValueError(
                f"memjax.value_and_grad: a {layer} is called inside a transformation of JAX, such as jit or vmap, "
                "that closes over it. Call it outside, or under nnx.jit or nnx.remat with the layer as an argument; "
                "nnx.value_and_grad differentiates it anywhere"
            ) from error


def recording_of(layer: nnx.Module | None) -> Recording | None:
    """The recording attached to a layer; None unless `memjax.value_and_grad` is running it."""
    return getattr(layer, "recording", None)


class LookupLayer(nnx.Module):
    """A layer that reads tables, which the model owns and passes in: `layer(x, *tables)`.

    A kind of lookup is a subclass with `READS`, `picks` and `with_reads`. To be used in a model's config, it also needs
    an entry in `memjax.memory.kinds`.
    """

    READS: ClassVar[tuple[ReadKind, ...]]
    """How each table is read."""
    picks: int
    """Number of rows of each table that a token reads."""

    def with_reads(
        self, x: Float[Array, "*b dim"], *tables: ValueTable, perturbations: Perturbations | None = None
    ) -> tuple[Float[Array, "*b dim"], tuple[TableRead, ...]]:
        """The layer's output, and its read of each table.

        Args:
            x: the layer's input.
            tables: one for each of `READS`.
            perturbations: zeros from `zero_perturbations`, added to what is read. Their cotangents and the reads make
                up the gradients of the tables.

        Raises:
            ValueError: x has the wrong width, or a table the wrong shape.
        """
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*b dim"], *tables: ValueTable) -> Float[Array, "*b dim"]:
        """The layer's output.

        Raises:
            TypeError: a table is not a ValueTable.
            ValueError: x has the wrong width, or the tables the wrong number or shape; or `memjax.value_and_grad` runs
                the layer inside a JAX transformation that its reads cannot leave.
        """
        name = type(self).__name__
        if len(tables) != len(self.READS):
            raise ValueError(f"{name}: layer(x, *tables) needs {len(self.READS)} ValueTable(s), found {len(tables)}")
        if wrong := [type(table).__name__ for table in tables if not isinstance(table, ValueTable)]:
            raise TypeError(f"{name}: layer(x, *tables) needs tables of type ValueTable, found {', '.join(wrong)}")
        x = jnp.asarray(x)  # NumPy arrays may have types that JAX disables, such as float64
        recording = recording_of(self)
        if recording is None:
            return self.with_reads(x, *tables)[0]
        out, found = self.with_reads(x, *tables, perturbations=recording.next_perturbations())
        recording.add(found, name)
        return out

    def perturbations_of(self, given: Perturbations | None) -> tuple[Float[Array, "t _"] | None, ...]:
        """A perturbation for each table; None for each if none are given.

        Raises:
            ValueError: there are not as many as tables.
        """
        if given is not None and len(given) != len(self.READS):
            raise ValueError(f"{type(self).__name__} takes {len(self.READS)} perturbations, found {len(given)}")
        return (None,) * len(self.READS) if given is None else tuple(given)

    def zero_perturbations(self, num_tokens: int, *tables: ValueTable) -> Perturbations:
        """Perturbations for `with_reads`, for a batch of num_tokens tokens."""
        pairs = zip(self.READS, tables, strict=True)
        return tuple(zero_perturbation(kind, num_tokens, self.picks, table.table) for kind, table in pairs)
