"""Tokenises a corpus once, on all cores, into a folder of prepared data that appears only when complete."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from memjax.data.prepared import store
from memjax.data.sources.corpus import Corpus, CorpusStream
from memjax.data.sources.files import DataFile, Payload
from memjax.data.sources.parsing import Keys, MalformedError
from memjax.data.sources.records import Record
from memjax.data.sources.stream import UnreadableError
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError
from memjax.io.children import LostError, calls_in_processes
from memjax.io.console import say
from memjax.io.lock import locked
from memjax.monitoring.progress import Progress

_BLOCK_BYTES = 1 << 19
_BYTES_PER_PROCESS = 8 << 20
"""Smaller files are tokenised faster than another process starts."""
_BLOCKS_AHEAD = 4
"""Blocks in flight per process: enough to keep it busy, few enough to bound memory."""

_Block = list[tuple[int, int, Payload]]


class _Tokenised(NamedTuple):
    records: list[bytes]
    """Encoded records; a malformed one is empty and keeps its number."""
    tokens: int
    largest_id: int
    malformed: list[tuple[int, int, MalformedError]]


class BlockTokenizer:
    """Parses and tokenises payloads; sent once to every process."""

    def __init__(self, files: Sequence[DataFile], keys: Keys, tokenizer: Tokenizer):
        self.files, self.keys, self.tokenizer = tuple(files), keys, tokenizer
        self._dtype = store.id_dtype(tokenizer.vocab_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in a process of many, one for each core
        self.__dict__.update(state)

    def __call__(self, block: _Block) -> _Tokenised:
        """The records of a block in order, and the malformed payloads."""
        records: list[Record] = []
        malformed = []
        for index, number, payload in block:
            try:
                records.append(self.files[index].record(payload, self.keys))
            except MalformedError as error:
                malformed.append((index, number, error))
                if not isinstance(error, UnreadableError):
                    records.append(())
        ids = iter(self.tokenizer.encode_batch([segment.text for record in records for segment in record]))
        encoded, tokens, largest = [], 0, 0
        for record in records:
            segments = [(next(ids), segment.learned) for segment in record]
            tokens += bool(segments) + sum(len(some) for some, _ in segments)
            largest = max([largest, *(max(some, default=0) for some, _ in segments)])
            encoded.append(store.encode_record(segments, self._dtype))
        if largest >= self.tokenizer.vocab_size:
            # Larger ids would silently wrap around in the stored type.
            raise DataError(f"the tokenizer gives the id {largest}, but has only {self.tokenizer.vocab_size}")
        return _Tokenised(encoded, tokens, largest, malformed)


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    *,
    asked_for: bool = True,
    processes: int | None = None,
    every_seconds: float = 5.0,
) -> None:
    """Tokenises a corpus into the folder, unless that has been done.

    Remains of an interrupted preparation are removed first. If several processes need the same folder, one prepares it
    and the others wait.

    The folder appears atomically at the end; `discard_outdated` keeps it if asked_for is set. `processes` defaults to
    one per core, or fewer for small files. Several processes import the main module, so a program must guard its entry
    point with `if __name__ == "__main__"`.

    Raises:
        DataError: records cannot be used and may not be skipped, or none is left, or the folder holds something else.
    """
    if store.is_prepared(folder):
        if asked_for and not (manifest := store.read_manifest(folder)).asked_for:
            with contextlib.suppress(OSError):  # the folder may be read-only
                store.write_manifest(folder, dataclasses.replace(manifest, asked_for=True))
        return
    partial = _partial(folder)
    try:
        with _locked(folder):
            if store.is_prepared(folder):
                return
            if folder.exists():
                raise DataError(
                    f"{folder}: exists, but holds no prepared data; remove it, or name another data.prepared"
                )
            if partial.exists():
                say(f"{partial}: removing an unfinished preparation and starting again")
                shutil.rmtree(partial)
            partial.mkdir()
            try:
                _prepare(corpus, tokenizer, partial, asked_for, processes, every_seconds)
                os.replace(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        # Errors of reading are reported as malformed records, so this one is of writing.
        raise DataError(f"{folder}: cannot be written ({error}); make room, or name another data.prepared") from error


def discard_outdated(corpus: Corpus, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Removes data prepared by a start with other settings or files, unless memjax.prepare made it.

    Raises:
        DataError: it cannot be read or removed.
    """
    if not store.is_prepared(folder):
        return
    try:
        with _locked(folder):
            manifest = store.read_manifest(folder)
            if manifest.asked_for or not store.misfits(manifest, corpus, tokenizer):
                return
            say(f"{folder}: was prepared by a start with other settings or files that made no step; removed")
            partial = _partial(folder)
            shutil.rmtree(partial, ignore_errors=True)
            os.replace(folder, partial)  # a half-removed folder must not look prepared
            shutil.rmtree(partial)
    except OSError as error:
        raise DataError(f"{folder}: cannot be removed ({error}); remove it, or name another data.prepared") from error


def _partial(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.partial")


def _locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    waiting = lambda holder: say(f"waiting for another process that prepares {folder} ({holder})")
    return locked(folder.with_name(f"{folder.name}.lock"), on_wait=waiting)


def _prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    asked_for: bool,
    processes: int | None,
    every_seconds: float,
) -> None:
    stream = CorpusStream(corpus)
    if processes is None:
        # Text is about four times as long as its compressed form.
        size = sum(file.path.stat().st_size * (4 if file.compression else 1) for file in stream.files)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(cores, size // _BYTES_PER_PROCESS)
    say(
        f"preparing {corpus.path} ({len(stream.files)} file{'s' * (len(stream.files) > 1)}, "
        f"{stream.total_bytes / 1e6:,.1f} MB) into {folder.with_suffix('')}"
    )
    started, tokens, largest, count, digest = time.monotonic(), 0, 0, 0, 0
    writer = store.Writer(folder)
    work = BlockTokenizer(stream.files, corpus.keys, tokenizer)
    try:
        with Progress(stream.total_bytes, every_seconds) as progress:
            for done in _tokenised(work, stream, processes):
                for index, number, error in done.malformed:
                    stream.leave_out(index, number, error)
                for record in done.records:
                    writer.write(record)
                    digest = zlib.crc32(record, digest)
                    count += not store.is_empty(record)
                tokens, largest = tokens + done.tokens, max(largest, done.largest_id)
                speed = f"{tokens / progress.elapsed:,.0f} tokens/s"
                progress.update(stream.bytes_read, f"{count:,} records  {tokens:,} tokens  {speed}")
        shards = writer.finish()
    finally:
        writer.abandon()
    if not count:
        raise DataError(f"{corpus.path}: no record can be used; set {corpus.field} to files with at least one")
    manifest = store.Manifest(
        settings=store.settings_of(corpus, tokenizer),
        files=corpus.names_and_sizes(),
        shards=shards,
        usable=count,
        digest=f"{digest:08x}",
        tokens=tokens,
        largest_id=largest,
        malformed=stream.num_malformed,
        examples=stream.examples,
        asked_for=asked_for,
    )
    store.write_manifest(folder, manifest)
    seconds = time.monotonic() - started
    say(f"prepared {count:,} records, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")


def _tokenised(work: BlockTokenizer, stream: CorpusStream, processes: int) -> Iterator[_Tokenised]:
    """The tokenised blocks of a stream, in order."""
    if processes <= 1:
        yield from map(work, _blocks(stream))
        return
    pending: collections.deque[Future[_Tokenised]] = collections.deque()
    try:
        with calls_in_processes(work, processes) as submit:
            for block in _blocks(stream):
                pending.append(submit(block))
                while len(pending) > _BLOCKS_AHEAD * processes or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except LostError as error:
        raise DataError(f"a process that tokenises {error}; give the preparation fewer processes") from error


def _blocks(stream: CorpusStream) -> Iterator[_Block]:
    block: _Block = []
    size = 0
    for item in stream:
        payload = item[2]
        block.append(item)
        texts = payload.values() if isinstance(payload, dict) else [payload]
        size += sum(len(text) if isinstance(text, str | bytes) else 8 for text in texts)
        if size >= _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
