"""The table of values that memory layers read."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.config import checks
from memjax.config.memory import MOST_KEYS
from memjax.ops.precision import accumulator
from memjax.ops.table import Table
from memjax.sharding.axes import split_columns

_BLOCK_ELEMENTS = 1 << 22
"""Elements drawn at once; it affects the initial values, since every block has its own key."""

MOST_SLOTS = MOST_KEYS**2
"""Rows of the largest table."""


class TableRows(nnx.Param):
    """Rows of a value table: a parameter read sparsely, with its own optimizer, sharding and checkpoint item.

    Its value is an array, or an `ops.table.Table` if the rows are read-only.
    """


class ValueTable(nnx.Module):
    """A table of values, owned by the model and passed to the layers that read it: `layer(x, table)`."""

    def __init__(
        self,
        num_slots: int,
        value_dim: int,
        *,
        init_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        name: str = "table",
        rngs: nnx.Rngs,
    ):
        """Draws num_slots rows of value_dim normal numbers with standard deviation init_scale * value_dim ** -0.5.

        Raises:
            ValueError: a number is out of range, or dtype is not a floating-point type of 16 bits or more.
        """
        problems = checks.counts(num_slots=num_slots, value_dim=value_dim) + checks.not_negative(init_scale=init_scale)
        if not problems and num_slots > MOST_SLOTS:
            problems.append(f"num_slots={num_slots} must be at most {MOST_SLOTS:,}: slot numbers are 32-bit")
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize == 1:
            problems.append(
                f"dtype={jnp.dtype(dtype).name} must be a type of floating-point numbers of 16 bits or more"
            )
        checks.refuse(problems)
        self.num_slots, self.value_dim, self.name = num_slots, value_dim, name
        std = init_scale * value_dim**-0.5
        self.rows = TableRows(draw_rows(rngs.params(), num_slots, value_dim, std=std, dtype=dtype))

    @property
    def table(self) -> Table | Float[Array, "n d"]:
        """The rows as operations accept them: an array, or a Table in another format or place (`memjax.load`)."""
        return self.rows.get_value()

    def rows_for(self, num_slots: int, value_dim: int, *, name: str = "the table") -> Table | Float[Array, "n d"]:
        """The rows, for a layer that addresses num_slots rows of value_dim.

        Raises:
            ValueError: the table has another shape; the message calls it `name`.
        """
        rows = self.table
        if rows.shape != (num_slots, value_dim):
            raise ValueError(
                f"{name} has [num_slots, value_dim] = {rows.shape}, the layer addresses {(num_slots, value_dim)}"
            )
        return rows


def draw_rows(
    key: Array,
    num_slots: int,
    value_dim: int,
    *,
    std: float,
    dtype: DTypeLike,
    block_elements: int = _BLOCK_ELEMENTS,
) -> Float[Array, "n d"]:
    """Draws normal rows block by block, in place: bit-identical on every mesh, with temporaries of a few blocks.

    Each block is drawn in float32 (bfloat16 draws have only 128 distinct values) from `fold_in(key, block)`, then cast.
    """
    block = min(num_slots, max(1, block_elements // value_dim))

    def write_block(number: Array | int, table: Array, rows: int = block) -> Array:
        values = std * jax.random.normal(jax.random.fold_in(key, number), (rows, value_dim), accumulator(dtype))
        values = split_columns(values.astype(dtype))
        return split_columns(jax.lax.dynamic_update_slice(table, values, (number * block, 0)))

    whole, rest = divmod(num_slots, block)
    table = split_columns(jnp.zeros((num_slots, value_dim), dtype))
    table = jax.lax.fori_loop(0, whole, write_block, table)
    return write_block(whole, table, rest) if rest else table
