"""Models and tables with random numbers, for timing: in any format, on the device or in host memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts
from memjax.ops import host_memory
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import SCALE_DTYPE, RowFormat
from memjax.ops.table import Place, Table
from memjax.runs.tables import TableForm, in_host_memory


@functools.partial(jax.jit, static_argnums=(0, 1))
def noise(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Numbers from -0.05 to 0.05, or codes from -64 to 63, by hashing each element's index.

    A single pass over the array: drawing normal numbers takes many times as long for a table of 34 GB.
    """
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        place = (place ^ (place >> 16)) * jnp.uint32(factor)
        place ^= place >> shift
    codes = (place >> 25).astype(jnp.int32) - 64
    return codes.astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else (codes / 1280).astype(dtype)


def random_table(row_format: RowFormat, place: Place, num_rows: int, width: int) -> Table:
    """A table of random codes, whose meaning does not affect timing."""
    form = TableForm("random", num_rows, width, row_format, place, "bfloat16")
    scales = jnp.full((num_rows, form.groups), 0.01, SCALE_DTYPE) if form.groups else None
    if place == "device":
        rows = noise(form.payload_shape, row_format.payload_dtype)
        return Table(rows, scales, format=row_format, value_dtype=form.value_dtype)
    memory = host_memory.allocate(form.payload_bytes)
    piece = np.random.default_rng(0).integers(0, 63, min(len(memory), 1 << 24)).astype(np.uint8)
    for start in range(0, len(memory), len(piece)):
        memory[start : start + len(piece)] = piece[: len(memory) - start]
    return in_host_memory(form, memory, scales)


def random_model(parts: DecoderParts, table_format: str | None, place: Place | None) -> Decoder:
    """A model with random numbers; its tables have the given format and place, or are plain arrays."""

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Vectors as at initialisation: with equal non-zero biases, all tokens would read the same rows.
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, 0 if "bias" in jax.tree_util.keystr(path) else 1, leaf.dtype)
        return noise(leaf.shape, leaf.dtype)

    params, shapes = jax.tree_util.tree_map_with_path(draw, parts.abstract_params), parts.abstract_tables
    if table_format is None or place is None:
        return parts.merge(params, jax.tree_util.tree_map_with_path(draw, shapes))
    row_format = formats.find(table_format)
    tables = {pool: random_table(row_format, place, *rows.shape) for pool, rows in shapes.items()}
    return parts.merge(params, tables)
