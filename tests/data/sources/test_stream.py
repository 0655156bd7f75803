import bz2
import errno
import gzip
import json
import lzma
import tracemalloc
from typing import Literal
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from memjax.data.sources.files import find_files
from memjax.data.sources.parsing import Keys, MalformedError
from memjax.data.sources.stream import RecordFiles, Stream, UnreadableError
from memjax.errors import DataError

TEXTS = ["one", "zwei é", "three\nlines\n", "x" * 3000]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def write_arrow(path, writer, rows_at_once=3):
    table = pyarrow.table({"id": range(4), "text": TEXTS})
    with pyarrow.OSFile(str(path), "wb") as out, writer(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows_at_once)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "packed.jsonl": lambda path: path.write_bytes(gzip.compress(LINES)),
    "otherwise.jsonl.zst": lambda path: path.write_bytes(lzma.compress(LINES)),
    "a.ndjson.zst": lambda path: path.write_bytes(zstd(LINES)),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"id": range(4), "text": TEXTS}), path),
    "a.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "a.array_record": lambda path: write_array_record(path, [json.dumps(row).encode() for row in ROWS]),
}


def read(path, source: Literal["text", "files"] = "files"):
    """Lists (number, text or error message) of every record."""
    (file,) = find_files(str(path), source, "data.path")
    found = []
    for number, payload in Stream(file, Keys()):
        try:
            found.append((number, "".join(segment.text for segment in file.record(payload, Keys()))))
        except MalformedError as error:
            found.append((number, error))
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == list(enumerate(TEXTS, start=1))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.unknown"])
def test_text_is_read_line_by_line_without_blank_lines_marks_and_line_ends(tmp_path, name):
    data = "\ufeffone\r\n\n  \ntwo \nthree".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / name, "text") == [(1, "one"), (4, "two "), (5, "three")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_records_up_to_the_limit_with_and_without_a_byte_order_mark(tmp_path, mark, end):
    path, limit = tmp_path / "a.txt", 10
    for size in range(limit - 3, limit + 4):
        path.write_bytes(f"{mark}{'x' * size}{end}next{end}".encode())
        (file,) = find_files(str(path), "text", "data.path")
        (_, first), (_, second) = Stream(file, Keys(), max_bytes=limit)
        assert first == b"x" * size if size <= limit else "more than data.max_record_bytes=10" in str(first)
        assert second == b"next"


@pytest.mark.parametrize("begin", ["BZhang wrote", "BZh9", "BZh91 lines", "BZh01AY&SY"])
def test_a_text_that_begins_like_bzip2_is_a_text(tmp_path, begin):
    (tmp_path / "a.txt").write_text(f"{begin}\ntwo\n")
    assert read(tmp_path / "a.txt") == [(1, begin), (2, "two")]


@pytest.mark.parametrize("level", [1, 9])
def test_bzip2_is_known_without_its_suffix(tmp_path, level):
    (tmp_path / "a.txt").write_bytes(bz2.compress(b"", level) + bz2.compress(b"one\ntwo\n", level))
    assert read(tmp_path / "a.txt") == [(1, "one"), (2, "two")]


def test_array_records_are_texts_where_the_source_says_so(tmp_path):
    write_array_record(tmp_path / "a.array_record", [b"one", b"two\nlines"])
    assert read(tmp_path / "a.array_record", "text") == [(1, "one"), (2, "two\nlines")]


def test_parquet_has_prompts_and_answers_too(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Q:"], "answer": ["A"], "other": [1]}), path)
    assert read(path) == [(1, "Q: A")]


def test_a_binary_column_of_parquet_is_read_as_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["é".encode(), b"\xff", b""]}), path)
    (_, text), (_, broken), (_, empty) = read(path)
    assert text == "é"
    assert "not UTF-8" in str(broken)
    assert "empty string" in str(empty)


def cut(data):
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("a.jsonl", "packed.jsonl")])
def test_a_cut_or_foreign_file_ends_with_what_is_wrong(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(cut(path.read_bytes()))
    *whole, (_, error) = read(path)
    assert isinstance(error, MalformedError)
    assert "the file is cut off or damaged here" in str(error)
    assert whole == list(enumerate(TEXTS, start=1))[: len(whole)]
    path.write_bytes(b"no such format " * 99)
    ((number, error),) = read(path)
    assert number == 1
    assert "the file is cut off or damaged here" in str(error)


def test_damage_in_the_middle_of_an_array_record_is_noticed(tmp_path):
    path = tmp_path / "a.array_record"
    # Large records that are not packed together, so that the damage lies inside one of them.
    write_array_record(path, [json.dumps({"text": chr(97 + i) * 100_000}).encode() for i in range(9)])
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)
    assert any(isinstance(found, MalformedError) for _, found in read(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.array_record"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    ((_, error),) = read(tmp_path / name)
    assert isinstance(error, MalformedError)


def test_an_arrow_stream_that_was_cut_between_two_batches_is_not_taken_for_complete(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path, pyarrow.ipc.new_stream, rows_at_once=2)
    whole = path.read_bytes()
    for cut in (8, 40, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        *_, (_, last) = read(path)
        assert isinstance(last, MalformedError)
        assert "cut off or damaged" in str(last)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path / name)
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); make it readable"):
        read(tmp_path / name)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    WRITERS["a.ndjson.zst"](tmp_path / "a.ndjson.zst")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow.*pip install pyarrow"):
        read(tmp_path / "a.ndjson.zst")


def test_progress_is_counted_in_bytes_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 99 + b"\n" + b"y" * 99 + b"\n")
    stream = Stream(find_files(str(path), "files", "data.path")[0], Keys())
    seen = [stream.bytes_read for _ in stream]
    assert seen == sorted(seen)
    assert path.stat().st_size == seen[-1] == 200


def streams_of(lines):
    """Two .xz streams end to end, with padding between them."""
    half = len(lines) // 2
    return lzma.compress(b"".join(lines[:half])) + bytes(8) + lzma.compress(b"".join(lines[half:]))


def test_streams_of_an_xz_file_are_read_to_the_end_or_the_damage_is_reported(tmp_path):
    path = tmp_path / "a.txt.xz"
    packed = streams_of([b"%d\n" % i for i in range(300)])
    path.write_bytes(packed)
    assert [text for _, text in read(path)] == [str(i) for i in range(300)]
    second = packed.index(b"\xfd7zXZ", 1)
    for at in range(second, second + 12):
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :])
        *whole, (number, error) = read(path)
        assert (len(whole), number) == (150, 151)
        assert isinstance(error, UnreadableError)
        assert "and what follows is lost" in str(error)


def test_a_parquet_value_that_is_not_utf8_is_one_malformed_row(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"one", b"\xff", b"three"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    (_, one), (number, error), (_, three) = read(path)
    assert (one, number, three) == ("one", 2, "three")
    assert isinstance(error, MalformedError)
    assert "UTF-8" in str(error)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_one_name_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    table = pyarrow.table([["one"], ["two"]], names=["text", "text"])
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"a\.{suffix}: several columns are called 'text'"):
        read(path)


def test_page_checksums_of_parquet_are_verified_if_present(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["needle in it" + "x" * 50] * 3})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, path, **options)
    path.write_bytes(path.read_bytes().replace(b"needle", b"noodle"))
    (_, error), *_ = read(path)
    assert isinstance(error, MalformedError)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst"])
def test_a_record_without_end_is_malformed_and_not_kept_in_memory(tmp_path, name):
    pack = {".gz": lambda d: gzip.compress(d, 1), ".xz": lzma.compress, ".zst": zstd}.get(name[5:], bytes)
    (tmp_path / name).write_bytes(pack(b"first\n" + bytes(30 << 20) + b"\nlast\n"))
    (file,) = find_files(str(tmp_path / name), "files", "data.path")
    tracemalloc.start()
    payloads = [payload for _, payload in Stream(file, Keys(), max_bytes=1000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
    assert (payloads[0], payloads[2]) == (b"first", b"last")
    assert "more than data.max_record_bytes=1,000 bytes; split it, or raise" in str(payloads[1])


@pytest.mark.parametrize(
    "name", ["a.json", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.Json.GZ", "a.txt", "a.md", "a.txt.xz"]
)
def test_files_of_a_command_line_are_read_as_training_reads_them(tmp_path, name):
    text = name.startswith(("a.txt", "a.md"))
    content = "\ufeffé b\r\n\nc\n" if text else '\ufeff{"text": "é b"}\n\n{"text": "c", "n": 1}'
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:].lower(), bytes)
    (tmp_path / name).write_bytes(pack(content.encode()))
    files = RecordFiles(str(tmp_path / name), "--text")
    assert [record[0].text for record in files] == ["é b", "c"]
    places, fields = zip(*files.fields("text"), strict=True)
    assert fields == ({"text": "é b"}, {"text": "c"} if text else {"text": "c", "n": 1})
    assert places == (f"{tmp_path / name}:1", f"{tmp_path / name}:3")


def test_a_bad_record_of_a_command_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        list(RecordFiles(str(tmp_path / "a.jsonl"), "--text"))


@pytest.mark.parametrize(
    "half", ['{"text": "\\ud800"}', '{"text": "x", "id": ["\\uDC00"]}', '{"text": "x", "\\udfff": 1}']
)
def test_half_of_a_surrogate_pair_in_a_field_is_named(tmp_path, half):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n' + half)
    found = RecordFiles(str(tmp_path / "a.jsonl"), "--prompts").fields("text")
    assert next(found)[1] == {"text": "\U0001f600"}
    with pytest.raises(DataError, match=r"a\.jsonl:2: holds half of a surrogate pair \('.ud"):
        next(found)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_end_in_records_and_malformed_ones_only(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(30):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        path.write_bytes(data)
        assert all(isinstance(found, str | MalformedError) for _, found in read(path))


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress)])
def test_what_follows_a_stream_is_read_or_named(tmp_path, name, pack):
    first, second = (pack(json.dumps({"text": text}).encode() + b"\n") for text in ("one", "two"))
    path = tmp_path / name
    path.write_bytes(first + second)
    assert read(path) == [(1, "one"), (2, "two")]
    # Both libraries treat a stream with a damaged header as trailing garbage and drop it silently.
    path.write_bytes(first + b"\x01" + second[1:])
    one, (number, error) = read(path)
    assert (one, number) == ((1, "one"), 2)
    assert isinstance(error, UnreadableError)


@pytest.mark.parametrize("writer", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_offsets_beyond_the_text_of_an_arrow_file_are_damage(tmp_path, writer):
    path = tmp_path / "a.arrow"
    write_arrow(path, writer, rows_at_once=4)
    sound, offsets = path.read_bytes(), np.array([0, 3, 10, 22, 3022], np.int32).tobytes()
    assert sound.count(offsets) == 1
    # PyArrow would read out of bounds and end the process with SIGSEGV.
    path.write_bytes(sound.replace(offsets, offsets[:-4] + np.int32(1 << 30).tobytes()))
    ((_, error),) = read(path)
    assert isinstance(error, UnreadableError)
    assert "a truncated or damaged Arrow file" in str(error)
