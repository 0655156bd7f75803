"""Tables of random codes, for timing: in any format, on the device or in host memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.models.decoder import Decoder
from memjax.models.parts import DecoderParts
from memjax.ops import host_memory
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import SCALE_DTYPE, RowFormat
from memjax.ops.table import Table


def random_table(row_format: RowFormat, place: str, num_rows: int, width: int) -> Table:
    """A table of random codes: what they mean does not matter for time."""
    shape, dtype = (num_rows, row_format.payload_columns(width)), row_format.payload_dtype
    memory = host_memory.allocate(shape[0] * shape[1] * dtype.itemsize)
    piece = np.random.default_rng(0).integers(0, 63, min(len(memory), 1 << 24)).astype(np.uint8)
    for start in range(0, len(memory), len(piece)):
        memory[start : start + len(piece)] = piece[: len(memory) - start]
    rows = memory.view(dtype).reshape(shape)
    groups = row_format.groups(width)
    scales = jnp.full((num_rows, groups), 0.01, SCALE_DTYPE) if groups else None
    common: dict[str, Any] = {"format": row_format, "value_dtype": "bfloat16", "place": place}
    if place == "device":
        return Table(jnp.asarray(rows), scales, **common)
    if jax.default_backend() == "cpu":
        return Table(host_memory.as_array(rows), scales, **common)
    return Table(host_memory.address_of(memory), scales, pinned=(num_rows, width), **common)


def random_model(parts: DecoderParts, table_format: str | None, place: str | None) -> Decoder:
    """A fresh model; with a format and a place its tables are random codes."""
    params, tables = parts.init(jax.random.key(0))
    if table_format is None or place is None:
        return parts.assemble(params, tables)
    shapes = {pool: rows.shape for pool, rows in tables.items()}
    del tables
    row_format = formats.find(table_format)
    return parts.assemble(params, {pool: random_table(row_format, place, *shape) for pool, shape in shapes.items()})
