import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.config.data import DataConfig
from memjax.data.dataset import open_dataset
from memjax.data.mixture import SplitRecords
from memjax.data.sources.files import find_files
from memjax.data.sources.lines import LineRecords
from memjax.data.sources.parsing import Keys
from memjax.data.sources.records import Segment
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import DataError


def texts(path):
    return LineRecords(find_files(str(path), "text", "data.path"))


def objects(path, *keys):
    return LineRecords(find_files(str(path), "jsonl", "data.path"), Keys(*keys))


def opened(config):
    dataset = open_dataset(config, ByteTokenizer())
    return SplitRecords(dataset.train), SplitRecords(dataset.validation)


LINES = st.lists(st.sampled_from(["a", "", "  ", " b", "é€", "\t", "c d ", "\r"]), max_size=12)


@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), ended=st.booleans(), mark=st.booleans())
def test_a_text_file_gives_its_non_blank_lines(tmp_path_factory, lines, end, ended, mark):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = end.join(["x", *lines]) + (end if ended else "")
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    by_hand = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    assert list(texts(path)) == [(Segment(line, True),) for line in by_hand]


def test_the_index_is_right_across_the_pieces_it_is_made_from(tmp_path, monkeypatch):
    monkeypatch.setattr("memjax.data.sources.lines._SCAN_BYTES", 7)
    lines = ["x" * (i % 11) for i in range(60)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    assert [record[0].text for record in texts(path)] == [line for line in lines if line]


def test_json_lines_are_texts_or_prompts_with_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "one", "prompt": 3},
        {"prompt": "Q:", "answer": "A"},
        {"prompt": "Q: ", "answer": "A"},
        {"prompt": "Q:", "answer": "\nA"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(objects(path)) == [
        (Segment("one", True),),
        (Segment("Q:", False), Segment(" A", True)),
        (Segment("Q: ", False), Segment("A", True)),
        (Segment("Q:", False), Segment("\nA", True)),
    ]


def test_the_keys_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "x"}\n{"q": "y", "a": "z"}')
    assert list(objects(path, "t", "q", "a")) == [
        (Segment("x", True),),
        (Segment("y", False), Segment(" z", True)),
    ]


@pytest.mark.parametrize(
    ("line", "what", "way_out"),
    [
        (b'{"text": "x"', "not JSON", "one whole JSON object per line"),
        (b'["x"]', "a JSON array, not an object", "one JSON object per line"),
        (b"7", "a JSON number, not an object", "one JSON object per line"),
        (b"Plain text.", r"not JSON", "set data.source=text to read lines of plain text"),
        (b'{"body": "x"}', r"has the fields \['body'\]", "set data.text_key"),
        (b'{"prompt": "x"}', r"has the fields \['prompt'\]", "data.prompt_key and data.answer_key"),
        (b'{"text": null}', "'text' is a null, not a string", "write the text as a string"),
        (b'{"prompt": "x", "answer": 4}', "'answer' is a number", "write the text as a string"),
        (b'{"prompt": "x", "answer": true}', "'answer' is a boolean", "write the text as a string"),
        (b'{"text": ""}', "'text' is an empty string", "remove the line"),
        (b'{"prompt": "", "answer": "x"}', "'prompt' is an empty string", "remove the line"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 11 of the line\);", "save it as text in UTF-8"),
        (b"PK\x03\x04\0\xff", r"not UTF-8 \(byte 6 of the line\), but UTF-16 or a binary file", "save it as"),
        ("text".encode("utf-16"), r"not UTF-8 \(byte 1 of the line\), but UTF-16 or a binary file", "save it as"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair", "write both halves"),
        (b"[" * 100_000, "not JSON", "one whole JSON object per line"),
    ],
)
def test_a_bad_line_is_named_with_the_way_out(tmp_path, line, what, way_out):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    source = objects(path)
    assert len(source) == 3
    assert source[2] == source[0] == (Segment("fine", True),)
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{what}.*{way_out}"):
        source[1]


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("fine\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt:2: not UTF-8 \(byte 4 of the line\)"):
        texts(path)[1]


def test_there_is_no_record_past_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb")
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"record {index} of 2 records"):
            texts(path)[index]


def test_a_source_travels_without_its_open_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb")
    source = texts(path)
    assert source[1] == pickle.loads(pickle.dumps(source))[1]


def test_missing_and_empty_files_are_refused_with_the_field_to_set(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text("\n  \n\r\n")
    good = tmp_path / "good"
    good.write_text("a\nb")
    for name, what in (
        ("none", "no such file"),
        ("empty", "no text"),
        ("blank", "no text"),
        (".", "holds no file that ends in .*"),
    ):
        bad = str(tmp_path / name)
        for kind in ("text", "jsonl"):
            with pytest.raises(DataError, match=f"{what}; set data.path to"):
                opened(DataConfig(source=kind, path=bad))
        with pytest.raises(DataError, match=f"{what}; set data.validation_path to"):
            opened(DataConfig(source="text", path=str(good), validation_path=bad))
    with pytest.raises(DataError, match=r"data\.path is null: source=text needs a file"):
        opened(DataConfig(source="text"))


@pytest.mark.parametrize(
    ("num_records", "fraction", "num_held_out"), [(1000, 0.005, 5), (10, 0.005, 1), (10, 0.3, 3), (2, 0.99, 1)]
)
def test_the_last_records_are_held_out(tmp_path, num_records, fraction, num_held_out):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(map(str, range(num_records))))
    training, validation = opened(DataConfig(source="text", path=str(path), validation_fraction=fraction))
    found = [record[0].text for part in (training, validation) for record in part]
    assert found == [str(i) for i in range(num_records)]
    assert len(validation) == num_held_out
    rng = np.random.default_rng(0)
    assert validation.draw(0, rng) == validation[0]
    with pytest.raises(IndexError):
        training[len(training)]


def test_validation_can_come_from_its_own_file_or_not_at_all(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("a")
    other.write_text("b")
    config = DataConfig(source="text", path=str(path), validation_path=str(other))
    training, validation = opened(config)
    assert (training[0][0].text, validation[0][0].text) == ("a", "b")
    assert not len(opened(DataConfig(source="text", path=str(path), validation_fraction=0.0))[1])
    with pytest.raises(DataError, match="one record cannot be split"):
        opened(DataConfig(source="text", path=str(path)))
    array = tmp_path / "array.json"
    array.write_text('[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(DataError, match=r"array.json:1: a JSON array, not an object; write one JSON object per line"):
        opened(DataConfig(source="jsonl", path=str(array)))


def test_a_file_that_is_cut_or_rewritten_while_it_is_read_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.txt"
    for change in (
        lambda: os.truncate(path, 100),
        lambda: path.write_text("".join(f"other {i:4d}\n" for i in range(100))),
        lambda: path.write_text("grown\n" * 500),
    ):
        path.write_text("".join(f"lines {i:4d}\n" for i in range(100)))
        records = texts(path)
        assert records[99] == (Segment("lines   99", True),)
        change()
        os.utime(path, ns=(1, 1))
        with pytest.raises(DataError, match=r"a\.txt: the file has changed since the run opened it; restore"):
            records[98]


def test_a_file_that_is_touched_or_replaced_by_its_copy_is_the_same_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc")
    records = texts(path)
    assert records[0] == (Segment("a", True),)
    os.utime(path, ns=(1, 1))
    assert records[1] == (Segment("b", True),)
    (tmp_path / "copy").write_bytes(path.read_bytes())
    os.replace(tmp_path / "copy", path)
    assert pickle.loads(pickle.dumps(records))[2] == (Segment("c", True),)


def test_a_removed_file_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb")
    records = texts(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: can no longer be read .*put the file back"):
        records[0]


def test_many_files_are_one_and_stay_closed_but_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr("memjax.data.sources.lines._OPEN_FILES", 3)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{number}a\n{number}b\n")
    records = texts(tmp_path)
    order = [7, 0, 19, 3, 8, 12, 1, 5, 16, 7]
    assert [records[i][0].text for i in order] == [f"{i // 2}{'ab'[i % 2]}" for i in order]
    assert len(records._open) <= 3


def test_a_line_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short\n" + "x" * 100)
    records = LineRecords(find_files(str(path), "text", "data.path"), max_bytes=99)
    assert records[0][0].text == "short"
    with pytest.raises(DataError, match=r"a\.txt:2: a record of more than data\.max_record_bytes=99 bytes"):
        records[1]
