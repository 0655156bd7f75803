"""Reads tensors from a file written by `torch.save`, without torch and without unpickling.

Such a file is a zip archive: `<name>/data.pkl` describes a tree of tensors, and `<name>/data/<key>` hold their bytes.
The description is a pickle, a program for a small virtual machine that can call anything. Here its instructions are
interpreted one by one, and only those that build a state dict are executed, on plain values: names stay names, and
nothing is imported, looked up or called. Any other instruction is refused by name.

A `pickle.Unpickler` whose `find_class` knows only these names would call nothing else either, but a few bytes could
still exhaust it: a large memo index makes it allocate gigabytes, and hashing nested tuples as the key of a dict never
ends.
"""

import functools
import os
import pathlib
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from memjax.errors import CheckpointError
from memjax.interop.official.lazy_array import LazyArray

_MAX_PICKLE_BYTES = 1 << 28
"""Longest description that is read; a state dict of 10,000 tensors takes about 2 MB."""

_MAX_AXES = 8
_MAX_DEPTH = 50
"""Deepest nesting of dicts, lists and tuples; a state dict needs 2, a full training checkpoint a few more."""
_MAX_SHOWN = 300
"""Longest message that may quote the file, in characters."""

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_REBUILD, _ORDERED_DICT = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"
_NAMES = {_REBUILD, _ORDERED_DICT, *(f"torch.{name}" for name in _STORAGES)}


class _Name(str):
    """A name that the pickle would have imported."""

    __slots__ = ()


class _Storage(NamedTuple):
    """A flat array in an entry of the archive."""

    key: str
    dtype: np.dtype
    size: int


class _Refused(Exception):
    """The file is refused; the message says why."""


def read_torch_zip(path: str | os.PathLike[str]) -> Any:
    """The tree of dicts, lists and tensors in a file of `torch.save`; the tensors are LazyArrays.

    Values are read, and checked against the archive's checksum, when a tensor is converted to NumPy.

    Raises:
        CheckpointError: the file is of another kind or damaged, or holds anything besides tensors and plain containers.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            folder, description = _description(archive)
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        return _Machine(lambda storage, *where: _tensor(path, folder, sizes, storage, *where)).run(description)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; name one that torch.save wrote") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: is not a complete zip archive ({error}); copy it again, or, if it is of torch before 1.6, load "
            "and save it once with a newer one"
        ) from error
    # zipfile also raises these: undecodable names, encrypted entries, truncated archives.
    except (_Refused, OSError, ValueError, RuntimeError, EOFError) as error:
        reason = str(error)
        reason = reason if len(reason) <= _MAX_SHOWN else f"{reason[:_MAX_SHOWN]}..."
        raise CheckpointError(f"{path}: {reason}; only tensors in dicts and lists are read, nothing was run") from None


def _description(archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The archive's folder, and the pickle in it."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise _Refused("holds two entries of one name")
    if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
        raise _Refused(f"holds compressed entries ({packed[0]!r}), which torch never writes")
    found = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(found) != 1:
        raise _Refused(f"holds {len(found)} entries <name>/data.pkl, must hold 1")
    folder = found[0].removesuffix("/data.pkl")
    if (order := f"{folder}/byteorder") in names and archive.read(order) != b"little":
        raise _Refused("was written by a big-endian machine")
    if (size := archive.getinfo(found[0]).file_size) > _MAX_PICKLE_BYTES:
        raise _Refused(f"describes its tensors in {size:,} bytes, more than the {_MAX_PICKLE_BYTES:,} that are read")
    return folder, archive.read(found[0])


class _Machine:
    """Executes the instructions that describe a state dict."""

    def __init__(self, tensor: Callable[..., LazyArray]):
        """`tensor` makes a tensor from a storage, an offset, a shape and strides."""
        self._tensor = tensor
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._depths: dict[int, tuple[Any, int]] = {}
        """Nesting depth of the containers, by id; they are kept alive here, so that no id is reused."""

    def run(self, description: bytes) -> Any:
        """Runs the description and returns the single value left on the stack."""
        try:
            for opcode, argument, _ in pickletools.genops(description):
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _Refused(f"has a description that makes no sense ({type(error).__name__}: {error})") from error
        if len(self._stack) != 1:
            raise _Refused("has a description that makes no sense")
        return self._stack[0]

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(self._tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._tuple(self._pop(int(name[-1]))))
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._name(argument))
            case "BINPERSID":
                stack.append(self._storage(*self._pop(1)))
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                # The attributes of an OrderedDict: versions of torch's modules.
                self._pop(1)
                self._top(dict)
            case _:
                raise _Refused(f"asks for the pickle instruction {name}, which no state dict needs")

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        found = tuple(items)
        self._nest(found, items)
        return found

    def _extend(self, items: list[Any]) -> None:
        self._nest(self._top(list), items)
        self._top(list).extend(items)

    def _update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        # Hashing nested tuples visits every path to each of them.
        if wrong := [key for key in keys if type(key) not in (str, int)]:
            raise _Refused(f"has a {type(wrong[0]).__name__} for the key of a dict, must have a str or an int")
        self._nest(self._top(dict), values)
        self._top(dict).update(zip(keys, values, strict=True))

    def _nest(self, container: Any, items: list[Any]) -> None:
        """Records how deeply a container is nested once it holds the items.

        Items that an inner container gets later are not seen. Depth is still bounded, because pickles of trees are
        built from the inside out, and a container that holds itself is refused.
        """
        inner = [self._depths.get(id(item), (None, 0))[1] for item in items if isinstance(item, dict | list | tuple)]
        if any(item is container for item in items):
            raise _Refused("has a container that holds itself")
        depth = max(self._depths.get(id(container), (None, 1))[1], 1 + max(inner, default=0))
        if depth > _MAX_DEPTH:
            raise _Refused(f"nests containers more than {_MAX_DEPTH} deep")
        self._depths[id(container)] = container, depth

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("nothing is left on the stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        return self._pop(len(self._stack) - start) if len(self._stack) > start else []

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError(f"a {type(self._stack[-1]).__name__} in place of a {kind.__name__}")
        return self._stack[-1]

    def _name(self, argument: str) -> _Name:
        name = ".".join(argument.split(" "))
        if name not in _NAMES:
            raise _Refused(f"asks for {name}, which is not run: no state dict needs it")
        return _Name(name)

    def _storage(self, persistent: Any) -> _Storage:
        word, kind, key, _, size = persistent
        if word != "storage" or not isinstance(kind, _Name) or not re.fullmatch(r"\d+", key) or not _is_count(size):
            raise ValueError("a storage that torch does not write")
        return _Storage(key, _STORAGES[kind.removeprefix("torch.")], size)

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name):
            raise _Refused("calls something that is not a name")
        if name == _ORDERED_DICT and arguments == ():
            return {}
        if name == _REBUILD:
            storage, offset, shape, strides = arguments[:4]
            return self._tensor(storage, offset, shape, strides)
        raise _Refused(f"calls {name} with arguments that no state dict has")


def _tensor(
    path: pathlib.Path, folder: str, sizes: Mapping[str, int], storage: Any, offset: Any, shape: Any, strides: Any
) -> LazyArray:
    """A tensor, after checking that it lies within its storage."""
    is_sound = isinstance(storage, _Storage) and len(shape) == len(strides) <= _MAX_AXES
    if not is_sound or not all(_is_count(number) for number in (offset, *shape, *strides)):
        raise ValueError("a tensor's place, shape or strides")
    entry = f"{folder}/data/{storage.key}"
    if sizes.get(entry) != storage.size * storage.dtype.itemsize:
        raise _Refused(
            f"storage {storage.key!r} should have {storage.size * storage.dtype.itemsize:,} bytes, the archive has "
            f"{sizes.get(entry, 'none')}"
        )
    count = int(np.prod(shape, dtype=object))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # Strides of 0 would make large tensors out of small files.
    if count > storage.size or (count and last >= storage.size):
        raise _Refused(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.size:,} numbers")
    read = functools.partial(_read, path, entry, storage.dtype, offset, shape, strides)
    return LazyArray(tuple(shape), storage.dtype, read)


def _read(
    path: pathlib.Path, entry: str, dtype: np.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            numbers = np.frombuffer(archive.read(entry), dtype)[offset:]
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path}: {entry} cannot be read ({error}); copy the file again") from error
    in_bytes = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers, shape, in_bytes, writeable=False)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
