"""Compressed files: recognised by magic bytes, or else by suffix, and read without silent loss."""

import bz2
import gzip
import io
import lzma
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

from memjax.errors import DataError

_COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    # "BZh" alone may begin a text; a block size and the magic of a block or of the end of the stream must follow.
    ".bz2": re.compile(rb"BZh[1-9](?:1AY|\x17rE)"),
}
"""Magic bytes by suffix."""
_MAGIC_BYTES = 7
"""The longest of these."""
_PIECE_BYTES = 1 << 16
_XZ_MEMORY = 1 << 30
"""Streams whose decoder needs more memory are refused; xz -9 needs 65 MB."""


def by_suffix(path: pathlib.Path) -> str:
    """.gz, .xz, .zst, .bz2 or nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def by_content(path: pathlib.Path) -> str:
    """Like `by_suffix`, but by magic bytes where they tell."""
    try:
        with path.open("rb") as file:
            start = file.read(_MAGIC_BYTES)
    except OSError:
        return by_suffix(path)  # reading it says what is wrong
    return next((name for name, magic in _COMPRESSIONS.items() if magic.match(start)), by_suffix(path))


def decompressed(path: pathlib.Path, compression: str, raw: BinaryIO) -> Any:
    """An open file's decompressed content."""
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), 1 << 20)
    if compression == ".xz":
        return io.BufferedReader(_Streams(raw, _new_xz), 1 << 20)
    if compression == ".zst":
        return io.BufferedReader(pyarrow_for(path).CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


class _Streams(io.RawIOBase):
    """The concatenated streams of an .xz or .bz2 file.

    `lzma.LZMAFile` and `bz2.BZ2File` treat a damaged header of a later stream as trailing garbage, and silently drop
    everything after it.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]):
        self._raw, self._new = raw, new
        self._stream = new()
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._stream.eof and not self._next_stream():
                return 0
            packed, self._packed = self._packed, b""
            if not packed and self._stream.needs_input and not (packed := self._raw.read(_PIECE_BYTES)):
                raise EOFError("the last stream has no end")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bool:
        packed = self._stream.unused_data
        while not (rest := packed.lstrip(b"\0")):  # zeros pad a stream to a multiple of 4 bytes
            if not (packed := self._raw.read(_PIECE_BYTES)):
                return False
        self._packed, self._stream = rest, self._new()
        return True


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def pyarrow_for(path: pathlib.Path) -> ModuleType:
    """The package pyarrow, needed to read the file at `path`; DataError if it cannot be imported."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: needs the package pyarrow, which cannot be imported ({error}); pip install pyarrow"
        ) from error
    return pyarrow
