"""Tokenised records in ArrayRecord files: writing, checking and random access.

A record is the number of its segments (a little-endian uint32), then for each segment twice its length plus 1 if it is
learned, then the ids of all segments, two bytes each if the vocabulary allows it. `manifest.json` describes their
origin.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from pydantic import NonNegativeInt

from memjax.data.sources.corpus import Corpus
from memjax.data.sources.records import Record, Segment, checked
from memjax.data.tokenize import Block, Reader, by_part, edges, make_block
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError
from memjax.io.documents import read_as
from memjax.io.files import read_text, write_atomic

_MANIFEST = "manifest.json"
_FORMAT = 1
_SHARD_BYTES = 1 << 31
# One record per group, for random access; ids are compact already, so decompressing them would cost more than the bytes
# saved.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Description of a folder of prepared data."""

    settings: dict[str, Any]
    """Everything that determined the ids besides the files, such as the tokenizer's fingerprint."""
    files: list[tuple[str, NonNegativeInt]]
    """Name and size of every file that was read."""
    shards: list[tuple[str, NonNegativeInt, NonNegativeInt]]
    """Name, size and number of records of every file that was written."""
    tokens: int
    """Number of tokens, including one EOS per record."""
    largest_id: int
    """Largest token id."""
    malformed: int
    """Number of skipped records."""
    examples: list[str]
    """The first skipped records, with the reasons."""
    usable: int = -1
    """Number of records that were not skipped; -1: all (before 0.2)."""
    digest: str = ""
    """Checksum of all records; empty before 0.2."""
    asked_for: bool = True
    """Whether memjax.prepare made it, rather than the start of a training run."""

    def __post_init__(self) -> None:
        if self.usable < 0:
            object.__setattr__(self, "usable", self.records)

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(count for _, _, count in self.shards)


def id_dtype(vocab_size: int) -> np.dtype:
    """The type in which ids are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_record(segments: Sequence[tuple[Sequence[int], bool]], dtype: np.dtype) -> bytes:
    """Encodes a record, given the ids of each segment and whether it is learned."""
    head = np.array([len(segments), *(2 * len(ids) + learned for ids, learned in segments)], "<u4")
    return b"".join([head.tobytes(), *(np.asarray(ids, dtype).tobytes() for ids, _ in segments)])


def is_empty(record: bytes) -> bool:
    """Whether a record is the placeholder of a skipped one."""
    return record == bytes(4)


def settings_of(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that determines the ids of a corpus, besides its files."""
    return {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **corpus.settings()}


class Writer:
    """Writes records into shards of a folder; the caller writes the manifest last, which marks them complete."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._shards: list[list[Any]] = []
        self._file: Any = None
        self._size = 0

    def write(self, record: bytes) -> None:
        """Appends a record.

        Raises:
            OSError: it cannot be written.
        """
        if self._file is None or self._size + len(record) > _SHARD_BYTES:
            self._close_shard()
            name = _shard_name(len(self._shards))
            self._file, self._size = ArrayRecordWriter(str(self.folder / name), _WRITER_OPTIONS), 0
            self._shards.append([name, 0, 0])
        try:
            self._file.write(record)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        self._size += len(record)
        self._shards[-1][2] += 1

    def finish(self) -> list[tuple[str, int, int]]:
        """Closes the last shard; returns the manifest's list of shards.

        Raises:
            OSError: the shard cannot be completed.
        """
        self._close_shard()
        return [(name, size, count) for name, size, count in self._shards]

    def abandon(self) -> None:
        """Closes an unfinished shard, ignoring errors."""
        if self._file is not None:
            with contextlib.suppress(RuntimeError):
                self._file.close()
            self._file = None

    def _close_shard(self) -> None:
        if self._file is None:
            return
        path = self.folder / self._shards[-1][0]
        file, self._file = self._file, None
        try:
            file.close()
        except RuntimeError as error:
            raise OSError(str(error)) from error
        with path.open("rb") as written:
            os.fsync(written.fileno())
        self._shards[-1][1] = path.stat().st_size


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest into the folder, atomically."""
    content = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    write_atomic(folder / _MANIFEST, json.dumps(content, indent=1, ensure_ascii=False))


def _shard_name(number: int) -> str:
    return f"{number:05d}.array_record"


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether the folder holds completely prepared data."""
    return (folder / _MANIFEST).is_file()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a folder; DataError if it cannot be read, or has another format."""
    path = folder / _MANIFEST
    try:
        content = json.loads(read_text(path))
        found = content.pop("format")
        if found == _FORMAT:
            if unknown := content.keys() - {field.name for field in dataclasses.fields(Manifest)}:
                raise ValueError(f"{min(unknown)[:40]}: no manifest has it")
            manifest = read_as(Manifest, content)
            if type(size := manifest.settings["vocab_size"]) is not int or size < 1:
                raise ValueError("settings.vocab_size: it must be a whole number above 0")
            names = [name for name, _, _ in manifest.shards]
            if names != [_shard_name(number) for number in range(len(names))]:
                raise ValueError("shards: they have other names than they were written with")
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise DataError(f"{path}: cannot be read ({reason}); {_AGAIN}") from error
    raise DataError(f"{path}: format={found!r} here, {_FORMAT} is what this version reads; {_AGAIN}")


_AGAIN = "delete the folder, so that the data is prepared again"


class PreparedReader(Reader):
    """The records of a folder of prepared data; nothing is tokenised."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        """Opens the folder; `open_prepared` also checks that it holds the expected data.

        Raises:
            DataError: a file is missing or does not have the size that was written.
        """
        self.folder, self.tokenizer = folder, tokenizer
        self.manifest = read_manifest(folder)
        self._dtype = id_dtype(self.manifest.settings["vocab_size"])
        self._starts = [0, *itertools.accumulate(count for _, _, count in self.manifest.shards)]
        self._files: dict[int, Any] = {}
        self._lock = threading.Lock()  # training and validation read in different threads
        for name, size, _ in self.manifest.shards:
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, {size} were written"
                raise DataError(f"{path}: {what}; {_AGAIN}")

    def __reduce__(self) -> tuple[type["PreparedReader"], tuple[pathlib.Path, Tokenizer]]:
        return PreparedReader, (self.folder, self.tokenizer)

    def __len__(self) -> int:
        return self._starts[-1]

    def __call__(self, numbers: Sequence[int], rng: np.random.Generator) -> Block:
        ids, lengths, learned, num_segments = self._read(numbers)
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:
            segment = np.searchsorted(np.cumsum(lengths), ids.argmax(), side="right")
            number = numbers[int(np.searchsorted(np.cumsum(num_segments), segment, side="right"))]
            raise DataError(
                f"{self.folder}: record {number} holds the id {ids.max()}, the tokenizer has "
                f"{self.tokenizer.vocab_size}; {_AGAIN}"
            )
        return make_block(ids, lengths, learned, num_segments, self.tokenizer)

    def fingerprint(self) -> dict[str, Any]:
        return {"digest": self.manifest.digest, "files": [[name, size] for name, size in self.manifest.files]}

    def record(self, number: int) -> Record:
        """The record's text, decoded from its ids; exact only if the tokenizer decodes exactly."""
        ids, lengths, learned, _ = self._read([checked(number, len(self))])
        pieces = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return tuple(
            Segment(self.tokenizer.decode(piece.tolist()), bool(is_learned))
            for piece, is_learned in zip(pieces, learned, strict=True)
        )

    def _read(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The ids of all records, the length of each segment, whether it is learned, and the number of segments of each
        record.
        """
        records = [b""] * len(numbers)
        for shard, places, wanted in by_part(numbers, self._starts):
            for place, record in zip(places, self._read_shard(shard, wanted), strict=True):
                records[place] = record
        sizes = np.fromiter(map(len, records), np.int64, len(records))
        stops = [4 + 4 * int.from_bytes(record[:4], "little") for record in records]
        heads = b"".join([record[4:stop] for record, stop in zip(records, stops, strict=True)])
        ids = b"".join([record[stop:] for record, stop in zip(records, stops, strict=True)])
        fits = np.array(stops, np.int64) <= sizes
        if fits.all():
            marks = np.frombuffer(heads, "<u4")
            lengths, num_segments = (marks >> 1).astype(np.int64), np.array(stops, np.int64) // 4 - 1
            num_ids = np.diff(edges(lengths)[edges(num_segments)])
            fits = stops + num_ids * self._dtype.itemsize == sizes
            if fits.all():
                return np.frombuffer(ids, self._dtype), lengths, marks & 1, num_segments
        raise DataError(f"{self.folder}: record {numbers[int(fits.argmin())]} is damaged; {_AGAIN}")

    def _read_shard(self, shard: int, wanted: list[int]) -> list[bytes]:
        name, _, count = self.manifest.shards[shard]
        path = self.folder / name
        try:
            with self._lock:
                if shard not in self._files:
                    file = ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=1 << 9)
                    if (found := file.num_records()) != count:
                        raise IndexError(f"{found} records, {count} in the manifest")
                    self._files[shard] = file
                file = self._files[shard]
                records = []
                for number in wanted:  # in this thread: passing a list to the library's threads is ten times slower
                    file.seek(number)
                    records.append(file.read())
                if file.ok():
                    return records
            what = "a truncated ArrayRecord file"
        except (RuntimeError, IndexError) as error:
            what = str(error)
        raise DataError(f"{path}: damaged ({what}); {_AGAIN}")


def open_prepared(folder: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer) -> PreparedReader:
    """The prepared data of a corpus.

    Raises:
        DataError: the folder holds other data or another tokenizer's ids, or is damaged.
    """
    reader = PreparedReader(folder, tokenizer)
    if changed := misfits(reader.manifest, corpus, tokenizer):
        raise DataError(
            f"{folder}: the prepared data does not fit: {'; '.join(changed)}; "
            "change it back, name another data.prepared, or delete the folder, so that the data is prepared again"
        )
    return reader


def misfits(manifest: Manifest, corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """How the prepared data differs from what a corpus and a tokenizer would give."""
    changed = [
        f"{name}={now!r} here, {manifest.settings.get(name)!r} in the prepared data"
        for name, now in settings_of(corpus, tokenizer).items()
        if manifest.settings.get(name) != now
    ]
    try:
        files = corpus.names_and_sizes()
    except DataError:
        files = manifest.files  # prepared data may be moved without its source files
    if files != manifest.files:
        names = sorted(
            {str(file[0]) for file in [*files, *manifest.files] if (file in files) != (file in manifest.files)}
        )
        changed.append(
            f"files {_amount(files)} here, {_amount(manifest.files)} in the prepared data (not the same: "
            f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''})"
        )
    if manifest.largest_id >= tokenizer.vocab_size:
        changed.append(f"vocab_size={tokenizer.vocab_size} here, an id {manifest.largest_id} in the prepared data")
    if manifest.malformed > corpus.config.max_malformed:
        changed.append(f"max_malformed={corpus.config.max_malformed} here, {manifest.malformed} in the prepared data")
    return changed


def _amount(files: list[tuple[str, int]]) -> str:
    return f"{len(files)} of {sum(size for _, size in files):,} bytes"
