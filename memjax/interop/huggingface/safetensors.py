"""Tensors in safetensors files, one or many with an index: read one at a time, written shard by shard.

The library refuses headers that are too long or not JSON, shapes that do not match their byte ranges, and ranges that
overlap or leave gaps. Checked here: an index names files in its own folder only, and agrees with their contents.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from memjax.errors import CheckpointError, shown
from memjax.interop.folders import file_in, read_json, write_json
from memjax.io.documents import line_of
from memjax.io.files import default_mode
from memjax.io.paths import hub_download

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The single file, or the index that maps tensors to files."""
_ONLY_SHARD = "model-00001-of-00001.safetensors"
"""Another name of the single file; some programs write an index next to it, some do not."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """The header entry of a tensor."""

    file: pathlib.Path
    dtype: str
    """The format's name: F32, BF16, ..."""
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of an open folder, read only on request."""

    def __init__(self, handles: dict[pathlib.Path, Any]):
        """`handles` are the library's file handles, by path."""
        self._handles = handles
        self.tensors: dict[str, StoredTensor] = {}
        """Every tensor by its name."""
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118  a handle is not a dict
                if name in self.tensors:
                    raise CheckpointError(f"{file}: tensor {name!r} is in {self.tensors[name].file.name} too")
                part = handle.get_slice(name)
                self.tensors[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor from disk; CheckpointError if it cannot be read."""
        file = self.tensors[name].file
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: tensor {name!r} cannot be read ({line_of(error)}); download it again"
            ) from error


@contextlib.contextmanager
def open_tensors(folder: str | os.PathLike[str]) -> Iterator[TensorFiles]:
    """Opens the tensors of a folder while the block runs.

    Raises:
        CheckpointError: there are none, the index is wrong, or a file is not a valid safetensors file.
    """
    folder = pathlib.Path(folder)
    single = next((name for name in (SINGLE, _ONLY_SHARD) if (folder / name).exists()), None)
    weight_map = _weight_map(folder) if single is None else None
    names = [single] if single is not None else sorted(set((weight_map or {}).values()))
    files = [file_in(folder, name) for name in names]
    with open_files(files) as found:
        if weight_map is not None:
            _compare(folder / INDEX, weight_map, {name: tensor.file.name for name, tensor in found.tensors.items()})
        yield found


@contextlib.contextmanager
def open_files(files: Iterable[pathlib.Path]) -> Iterator[TensorFiles]:
    """Opens the tensors of files while the block runs.

    Raises:
        CheckpointError: one is not a valid safetensors file, or two hold tensors of the same name.
    """
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: is not a valid safetensors file ({line_of(error)}); download or copy it again"
                ) from error
        yield TensorFiles(handles)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor that is computed when its file is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: pathlib.Path, tensors: Iterable[TensorToWrite], *, max_bytes: int) -> None:
    """Writes the tensors to one file or, if that would exceed max_bytes, to several with an index.

    A file holds at least one tensor, however large. Only the tensors of one file are in memory at once.

    Raises:
        OSError: a file cannot be written.
    """
    shards = _shards(tensors, max_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        # Readers for torch require the format's name.
        arrays = {tensor.name: np.ascontiguousarray(tensor.make()) for tensor in shard}
        try:
            save_file(arrays, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / name}: {line_of(error)}") from error
        # The library makes files that only the owner can read.
        (folder / name).chmod(default_mode())
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterable[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """The file of each tensor according to the index; these names are not checked yet."""
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: {_why_nothing(folder)}")
    weight_map = read_json(file_in(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map must name the file of each tensor")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: weight_map[{tensor!r}]={file!r} must name a .safetensors file")
    return weight_map


def _why_nothing(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        download, problem = hub_download(folder), "is a file" if folder.exists() else "there is no such folder"
        return f"{problem}; name the folder of a downloaded model" + f" (`{download}`)" * bool(download)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run any code when they are read, so "
            f"they are not; use the model's {SINGLE}, or save it as such with transformers if you trust it"
        )
    return f"there is neither {SINGLE} nor {INDEX}; name the folder of a downloaded model"


def _compare(index: pathlib.Path, promised: dict[str, str], found: dict[str, str]) -> None:
    # Tied weights and buffers may be absent from the files or the index; other missing tensors are noticed on reading.
    # A tensor in another file than the index says is a sign of two mixed-up downloads.
    wrong = [
        f"tensor {name!r} is in {found[name]}, the index says {promised[name]}"
        for name in sorted(promised.keys() & found.keys())
        if promised[name] != found[name]
    ]
    if wrong:
        raise CheckpointError(f"{index}: {'; '.join(shown(wrong, 3))}")
