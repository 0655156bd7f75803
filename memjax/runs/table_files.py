"""Table files, which `python -m memjax.convert quantize` writes in place of a checkpoint's tables.

Their bytes are those that operations read, so that a CPU can memory-map them.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from memjax.errors import CheckpointError
from memjax.ops import host_memory
from memjax.ops.row_formats import formats
from memjax.ops.row_formats.formats import SCALE_DTYPE, Encoded, RowFormat
from memjax.ops.table import Table
from memjax.runs.tables import Blocks, TableForm, build, in_host_memory

_READ_BYTES = 64 << 20
"""Bytes of a file that are read and hashed at once."""


def write_files(folder: pathlib.Path, form: TableForm, blocks: Blocks) -> dict[str, Any]:
    """Writes a table's files; returns the record that `read_files` needs, as JSON values."""
    paths = _paths(folder, form)
    for path in paths.values():
        path.touch()
    for _, block in blocks:
        for path, part in zip(paths.values(), block, strict=False):
            with open(path, "ab") as file:
                # Not `ndarray.tofile`, which loses the error when the disk fills up.
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
    return {
        "format": form.format.name,
        "group": form.width // form.groups if form.groups else None,
        "value_dtype": form.value_dtype,
        "num_rows": form.num_rows,
        "width": form.width,
        "files": {name: {"bytes": path.stat().st_size, "digest": _file_digest(path)} for name, path in paths.items()},
    }


def _file_digest(path: pathlib.Path) -> str:
    """The digest of a file: a hash of the hashes of its pieces, which threads read in parallel."""
    size = path.stat().st_size

    def piece(start: int) -> bytes:
        with open(path, "rb") as file:
            return hashlib.blake2b(os.pread(file.fileno(), _READ_BYTES, start), digest_size=16).digest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        pieces = threads.map(piece, range(0, size, _READ_BYTES))
        return hashlib.blake2b(b"".join(pieces), digest_size=16).hexdigest()


def stored_format(record: Mapping[str, Any]) -> RowFormat:
    """The format of a table's files; ValueError if this version has no format of that name."""
    found = formats.find(record["format"])
    # The default group may have been different when the files were written.
    return dataclasses.replace(found, group=record["group"]) if isinstance(found, formats.Scaled) else found


def read_files(
    folder: pathlib.Path, form: TableForm, record: Mapping[str, Any], sharding: Sharding | None
) -> Table | Array:
    """Reads a table from a run's files into the form's place.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: there is too little memory for it.
    """
    paths = _paths(folder, form)
    if paths.keys() != record["files"].keys():
        raise CheckpointError(f"{folder}: table {form.name} in {form.format.name} needs the files {', '.join(paths)}")
    for name, path in paths.items():
        _check(path, record["files"][name])
    columns, dtype = form.payload_shape[1], form.format.payload_dtype
    step = max(1, _READ_BYTES // max(1, columns * dtype.itemsize))

    def part(name: str, columns: int, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        values = np.fromfile(paths[name], dtype, count=count * columns, offset=start * columns * dtype.itemsize)
        return values.reshape(count, columns)

    def scales(start: int, count: int) -> np.ndarray | None:
        return part("scales", form.groups, SCALE_DTYPE, start, count) if form.groups else None

    def blocks() -> Iterator[tuple[int, Encoded]]:
        for start in range(0, form.num_rows, step):
            count = min(step, form.num_rows - start)
            yield start, Encoded(part("rows", columns, dtype, start, count), scales(start, count))

    if form.place == "host" and jax.default_backend() == "cpu":
        of_rows = scales(0, form.num_rows)
        mapped = host_memory.map_file(paths["rows"], form.payload_bytes)
        return in_host_memory(form, mapped, None if of_rows is None else jnp.asarray(of_rows))
    return build(form, blocks, sharding)


def _paths(folder: pathlib.Path, form: TableForm) -> dict[str, pathlib.Path]:
    """The files of a table, in the order of the fields of `Encoded`."""
    parts = ("rows", "scales") if form.groups else ("rows",)
    return {part: folder / f"{form.name}.{part}" for part in parts}


def _check(path: pathlib.Path, expected: Mapping[str, Any]) -> None:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{path}: has {size} bytes, not {expected['bytes']}")
        if _file_digest(path) != expected["digest"]:
            raise CheckpointError(f"{path}: is damaged, its digest differs")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
