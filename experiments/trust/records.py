"""The families of files with records."""

import bz2
import gzip
import io
import json
import lzma
import pathlib
from collections.abc import Callable
from typing import Any

from fuzz import Family

TEXTS = [f"record {number}: " + "word é " * (number % 7) + "end" for number in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
HALF = LINES.index(b"\n", len(LINES) // 2) + 1


def _data(files: dict[str, bytes], *, sealed: bool) -> Callable[[pathlib.Path], Family]:
    """A family of record files; sealed ones, with checksums, must give every record or an error."""

    def make(folder: pathlib.Path) -> Family:
        from memjax.data.sources.stream import RecordFiles

        paths = [folder / name for name in files]
        for path in paths:
            path.write_bytes(files[path.name])
        halves = [f"cut at {len(half)}" for half in (*_packed(gzip), *_packed(lzma), *_packed(bz2))]
        read = lambda: [[record.text for record, *_ in RecordFiles(str(path), "data.path")] for path in paths]

        def same(found: Any, right: Any, how: str) -> str:
            # An empty or different file does not count as damaged, nor does one of the two streams by itself.
            is_other = how.startswith(("a link", "empty", "missing")) or how in halves
            return "" if found == right or not sealed or is_other else "records are missing or others"

        return Family(paths, read, same, named=True)

    return make


def lines(folder: pathlib.Path) -> Family:
    """Lines of JSON and of plain text, without checksums."""
    return _data({"a.jsonl": LINES, "a.txt": "\n".join(TEXTS).encode()}, sealed=False)(folder)


def _packed(module: Any) -> tuple[bytes, bytes]:
    return module.compress(LINES[:HALF]), module.compress(LINES[HALF:])


def gz(folder: pathlib.Path) -> Family:
    """Gzip with one member and with two."""
    two = b"".join(_packed(gzip))
    return _data({"a.jsonl.gz": gzip.compress(LINES), "two.jsonl.gz": two}, sealed=True)(folder)


def xz(folder: pathlib.Path) -> Family:
    """XZ with one stream and with two."""
    two = b"".join(_packed(lzma))
    return _data({"a.jsonl.xz": lzma.compress(LINES), "two.jsonl.xz": two}, sealed=True)(folder)


def bz(folder: pathlib.Path) -> Family:
    """Bzip2 with one stream and with two, the latter with another suffix."""
    two = b"".join(_packed(bz2))
    return _data({"a.jsonl.bz2": bz2.compress(LINES), "two.jsonl.gz": two}, sealed=True)(folder)


def zst(folder: pathlib.Path) -> Family:
    """Zstandard, without checksums, which pyarrow does not write."""
    import pyarrow

    return _data({"a.jsonl.zst": pyarrow.compress(LINES, codec="zstd", asbytes=True)}, sealed=False)(folder)


def parquet(folder: pathlib.Path) -> Family:
    """Parquet with page checksums, which do not cover the footer."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file, write_page_checksum=True, row_group_size=20)
    return _data({"a.parquet": file.getvalue()}, sealed=False)(folder)


def arrow(folder: pathlib.Path) -> Family:
    """Arrow streams and files, without checksums."""
    import pyarrow
    import pyarrow.ipc

    table, files = pyarrow.table({"id": range(60), "text": TEXTS}), {}
    for name, writer in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        out = io.BytesIO()
        with writer(out, table.schema) as written:
            written.write_table(table, max_chunksize=20)
        files[f"{name}.arrow"] = out.getvalue()
    return _data(files, sealed=False)(folder)


def array_record(folder: pathlib.Path) -> Family:
    """ArrayRecord, whose blocks have checksums."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = folder / "made.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for line in LINES.splitlines():
        writer.write(line)
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return _data({"a.array_record": content}, sealed=True)(folder)


def prepared(folder: pathlib.Path) -> Family:
    """Prepared data and its manifest."""
    import numpy as np

    from memjax.config.data import DataConfig
    from memjax.data.prepared.prepare import prepare
    from memjax.data.prepared.store import open_prepared
    from memjax.data.sources.kinds import find_source
    from memjax.data.tokenizers.base import ByteTokenizer

    (folder / "a.jsonl").write_bytes(LINES)
    (corpus,) = find_source(DataConfig(source="jsonl", path=str(folder / "a.jsonl"))).corpora
    place, tokenizer = folder / "prepared", ByteTokenizer()
    prepare(corpus, tokenizer, place, processes=1)

    def read() -> Any:
        reader = open_prepared(place, corpus, tokenizer)
        # A damaged manifest may claim any number of records.
        numbers = range(min(len(reader), 100))
        return [pairs.tolist() for pairs in reader(numbers, np.random.default_rng(0)).split()]

    (data,) = place.glob("*.array_record")
    # The number of records comes from the manifest.
    same = lambda found, right, how: "" if all(a == b for a, b in zip(found, right, strict=False)) else "other ids"
    return Family([data, place / "manifest.json"], read, same)


RECORDS = {make.__name__: make for make in (lines, gz, xz, bz, zst, parquet, arrow, array_record, prepared)}
UNSEALED = ("lines", "zst", "parquet", "arrow")
"""Families without a checksum over the whole file: damage may result in another sound file."""
