"""Build tables in a storage format, on devices or in host memory, a block of rows at a time."""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array

from memjax.errors import ConfigError
from memjax.monitoring.units import gigabytes
from memjax.ops import host_memory
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import SCALE_DTYPE, Encoded, RowFormat, row_bytes
from memjax.ops.table import Place, Table
from memjax.sharding.rules import MEMORY

Blocks = Iterable[tuple[int, Encoded]]
"""Blocks of encoded rows, each with the index of its first row."""

LoadOption = Literal["table_format", "table_place", "memory_devices"]
"""A setting that makes tables need less device memory."""
LOAD_OPTIONS: tuple[LoadOption, ...] = ("table_format", "table_place", "memory_devices")

_PIECE_ELEMENTS = 1 << 20
"""Elements that a thread encodes at once, few enough to stay in cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class TableForm:
    """Shape, format and place of a table to build."""

    name: str
    num_rows: int
    width: int
    format: RowFormat
    place: Place
    value_dtype: str
    """Type in which operations return rows."""

    @classmethod
    def of(cls, name: str, rows: Any, row_format: RowFormat, place: Place = "device") -> "TableForm":
        """The form of a table with the shape of `rows`, read in their type."""
        return cls(name, rows.shape[0], rows.shape[1], row_format, place, jnp.dtype(rows.dtype).name)

    @property
    def groups(self) -> int:
        """Number of scales per row."""
        return self.format.groups(self.width)

    @property
    def payload_shape(self) -> tuple[int, int]:
        """Shape of the stored array, without scales."""
        return self.num_rows, self.format.payload_columns(self.width)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the stored array, without scales."""
        return math.prod(self.payload_shape) * self.format.payload_dtype.itemsize


def check_room(
    forms: Sequence[TableForm], sharding: Sharding | None, advise: Collection[LoadOption] = LOAD_OPTIONS
) -> None:
    """Raises ConfigError, before anything is allocated, if the tables do not fit in the device's free memory.

    The message has the sizes, and recommends those settings in `advise` that would need less.
    """
    device, split = jax.devices()[0], _devices(sharding)
    on_cpu, stats = device.platform == "cpu", device.memory_stats() or {}
    if on_cpu:
        free, split = host_memory.available_bytes(), 1  # CPU devices share the machine's memory
    else:
        free = stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    size = lambda row_format: sum(form.num_rows * row_bytes(row_format(form), form.width) for form in forms) // split
    needed = size(lambda form: form.format)
    if free is None or needed <= free:
        return
    ways = []
    for name in ("int8", "int4") if "table_format" in advise else ():
        with contextlib.suppress(ValueError):  # the format does not support this width
            if (less := size(lambda form, name=name: formats.find(name))) <= free:
                ways.append(f"table_format={name} ({gigabytes(less)})")
    if "table_place" in advise:
        files = ", which maps the files that `python -m memjax.convert quantize` writes" if on_cpu else ""
        ways.append(f"table_place=host{files}")
    if "memory_devices" in advise and not on_cpu:
        ways.append(f"memory_devices={-(-needed * split // max(1, free))}")
    if ways:
        way_out = f"load with {' or '.join(ways)}"
    else:
        way_out = "use a machine with more" if on_cpu else "set JAX_PLATFORMS=cpu to use the memory of the machine"
    raise ConfigError(
        f"{gigabytes(needed)} is more than the {gigabytes(free)} of memory that "
        f"{'this machine' if on_cpu else 'a device'} has left; {way_out}"
    )


def _devices(sharding: Sharding | None) -> int:
    return sharding.mesh.shape[MEMORY] if isinstance(sharding, NamedSharding) else 1


def encoded(blocks: Iterable[tuple[int, np.ndarray]], row_format: RowFormat) -> Iterator[tuple[int, Encoded]]:
    """Encodes blocks of rows; several threads share a block."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for start, rows in blocks:
            step = max(1, _PIECE_ELEMENTS // max(1, rows.shape[1]))
            pieces = [rows[first : first + step] for first in range(0, len(rows), step)]
            parts = list(threads.map(row_format.encode, pieces))
            scales = [part.scales for part in parts if part.scales is not None]
            joined = np.concatenate(scales) if scales else None
            yield start, Encoded(np.concatenate([part.payload for part in parts]), joined)


def build(form: TableForm, blocks: Callable[[], Blocks], sharding: Sharding | None) -> Table | Array:
    """Builds a table block by block, straight into place; a plain array if the form is plain. In host memory, `blocks`
    is called only once the rows are allocated.

    Raises:
        ConfigError: there is too little memory, or the table cannot be sharded as requested.
    """
    if form.place == "device":
        return _on_device(form, blocks(), sharding)
    if isinstance(sharding, NamedSharding):
        raise ConfigError("table_place=host is for one device; leave memory_devices out, or use table_place=device")
    scales = _DeviceRows((form.num_rows, form.groups), SCALE_DTYPE, None) if form.groups else None

    memory = host_memory.allocate(form.payload_bytes)
    rows = _typed(memory, form)
    for start, block in blocks():
        rows[start : start + len(block.payload)] = block.payload
        if scales is not None:
            scales.put(block.scales, start)
    return in_host_memory(form, memory, None if scales is None else scales.array)


def in_host_memory(form: TableForm, memory: np.ndarray, scales: Array | None) -> Table:
    """A table whose payload is this host memory."""
    common = {"format": form.format, "value_dtype": form.value_dtype, "place": "host"}
    if jax.default_backend() == "cpu":
        return Table(host_memory.as_array(_typed(memory, form)), scales, **common)
    return Table(host_memory.address_of(memory), scales, pinned=(form.num_rows, form.width), **common)


def _on_device(form: TableForm, blocks: Blocks, sharding: Sharding | None) -> Table | Array:
    devices = _devices(sharding)
    if form.groups and (form.groups % devices or form.payload_shape[1] % devices):
        raise ConfigError(
            f"table_format={form.format.name} has {form.groups} scales a row of {form.width} columns, which "
            f"cannot be split evenly over {devices} devices; use a number that divides {form.groups}"
        )
    check_room([form], sharding)
    rows = _DeviceRows(form.payload_shape, form.format.payload_dtype, sharding)
    scales = _DeviceRows((form.num_rows, form.groups), SCALE_DTYPE, sharding) if form.groups else None
    for start, block in blocks:
        rows.put(block.payload, start)
        if scales is not None:
            scales.put(block.scales, start)
    if isinstance(form.format, formats.Plain) and form.format.name == form.value_dtype:
        return rows.array
    found = None if scales is None else scales.array
    return Table(rows.array, found, format=form.format, value_dtype=form.value_dtype)


class _DeviceRows:
    """An array on the device that is filled block by block, in place."""

    def __init__(self, shape: tuple[int, int], dtype: Any, sharding: Sharding | None) -> None:
        self._sharding = sharding
        self.array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
        put = jax.lax.dynamic_update_slice_in_dim
        self._put = jax.jit(lambda all_, some, start: put(all_, some, start, 0), donate_argnums=0)

    def put(self, rows: np.ndarray | None, start: int) -> None:
        """Writes rows beginning at row `start`."""
        self.array = self._put(self.array, jax.device_put(rows, self._sharding), start)


def _typed(memory: np.ndarray, form: TableForm) -> np.ndarray:
    return memory.view(form.format.payload_dtype).reshape(form.payload_shape)
