"""The Table type: rows in any storage format, on the device or in host memory."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from memjax.ops.row_formats.formats import Plain, RowFormat, Zeros

Place = Literal["device", "host"]
"""device: the memory of the device that computes; host: the machine's memory, read over the bus."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "scales"),
    meta_fields=("format", "place", "value_dtype", "pinned"),
)
@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in a storage format and a place. A pytree: arrays are data, the other fields are static.

    Operations also take a plain array as a table. Tables with scales, and tables in host memory, are read-only.
    """

    rows: Any
    """[n, payload columns]; for a table in pinned host memory, its address as uint32[2]."""
    scales: Any = None
    """[n, groups], for formats that have them; on the device."""
    _: dataclasses.KW_ONLY
    format: RowFormat
    value_dtype: str
    """Type in which operations return what they read."""
    place: Place = "device"
    pinned: tuple[int, int] | None = None
    """Numbers of rows and columns, if `rows` is an address."""

    @classmethod
    def of(cls, table: "Table | Float[Array, 'n d']") -> "Table":
        """The table itself, or an array wrapped as a plain table on the device."""
        if isinstance(table, Table):
            return table
        table = jnp.asarray(table)
        name = table.dtype.name
        return cls(table, format=Plain(name), value_dtype=name)

    @classmethod
    def encoded(cls, rows: Float[Array, "n d"], row_format: RowFormat) -> "Table":
        """Encodes rows, on the first device. For large tables, see `memjax.load`, which encodes block by block.

        Raises:
            ValueError: the format cannot store the rows.
        """
        payload, scales = row_format.encode(np.asarray(rows))
        value_dtype = rows.dtype if row_format.has_scales else row_format.payload_dtype
        return cls(
            jnp.asarray(payload),
            None if scales is None else jnp.asarray(scales),
            format=row_format,
            value_dtype=jnp.dtype(value_dtype).name,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, as the operations see them."""
        if self.pinned is not None:
            return self.pinned
        return (*self.rows.shape[:-1], self.format.width(self.rows.shape[-1]))

    @property
    def ndim(self) -> int:
        """Axes; 2 for a table."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type in which operations return what they read."""
        return jnp.dtype(self.value_dtype)

    @property
    def is_read_only(self) -> bool:
        """Whether it has no gradient."""
        return self.format.has_scales or self.place != "device" or self.format.payload_dtype != self.dtype

    def take(self, indices: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b d"]:
        """The rows at `indices`, decoded to `dtype`, as the XLA implementations read them. Indices are not checked."""
        pick = lambda array: array.at[indices].get(mode="promise_in_bounds")
        payload = pick(self.rows)
        if payload.dtype != self.format.payload_dtype:
            # Types that NumPy lacks come from host memory as their bits.
            payload = jax.lax.bitcast_convert_type(payload, self.format.payload_dtype)
        return self.format.decode(payload, None if self.scales is None else pick(self.scales), dtype)

    def zeroed(self) -> "Table":
        """The table with all values read as zeros, without allocating other rows."""
        if self.scales is not None:
            return dataclasses.replace(self, scales=jnp.zeros_like(self.scales))
        return dataclasses.replace(self, format=Zeros(self.format.name))

    def describe(self) -> str:
        """Format, shape and place in a few words."""
        return f"{self.format.name}[{', '.join(map(str, self.shape))}] in {self.place} memory"


def differentiable(operation: str, table: Any) -> bool:
    """Whether a table's gradient is needed, given its leaves in the forward rule of `jax.custom_vjp`.

    Raises:
        TypeError: it is, but the table is read-only.
    """
    perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(table))
    if perturbed and table.is_read_only:
        raise TypeError(
            f"{operation}: a table of {table.format.name} in {table.place} memory is read-only and has no gradient; "
            "train it in float32 or bfloat16 on the device, or exclude it from differentiation (jax.lax.stop_gradient)"
        )
    return perturbed
