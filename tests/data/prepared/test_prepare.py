"""Prepared data equals its source files; broken files are refused or skipped and counted; partial work is redone."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memjax.config.data import DataConfig
from memjax.data.prepared import prepare as prepare_module
from memjax.data.prepared import store
from memjax.data.prepared.prepare import discard_outdated, prepare
from memjax.data.prepared.store import PreparedReader, open_prepared
from memjax.data.sources.corpus import Corpus
from memjax.data.sources.parsing import Keys
from memjax.data.tokenize import TextReader
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.data.tokenizers.bpe import train_bpe
from memjax.errors import DataError

BYTES = ByteTokenizer()


def corpus(path, *, source: Literal["text", "files"] = "files", **settings):
    config = DataConfig(**settings)
    return Corpus(name="training", path=str(path), source=source, field="data.path", config=config)


def everything(reader):
    return [pairs.tolist() for pairs in reader(range(len(reader)), np.random.default_rng(0)).split()]


@pytest.fixture
def lines(tmp_path):
    """70 records, both texts and prompts with answers, separated by blank lines."""
    rows = [{"text": f"é{i} " * (i % 9 + 1)} if i % 3 else {"prompt": f"{i}:", "answer": "y" * i} for i in range(1, 71)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_prepared_records_are_those_of_the_files(tmp_path, lines, kind, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BLOCK_BYTES", 100)
    tokenizer = BYTES if kind == "byte" else train_bpe(["y é yy é1 é2"] * 9, 280)
    prepare(corpus(lines), tokenizer, tmp_path / "p")
    prepared, direct = PreparedReader(tmp_path / "p", tokenizer), TextReader(corpus(lines).lines, tokenizer)
    assert len(prepared) == 70
    assert everything(prepared) == everything(direct)
    assert [prepared.record(i) for i in range(70)] == [direct.record(i) for i in range(70)]
    assert prepared.manifest.tokens == sum(map(len, everything(direct)))
    assert prepared.manifest.largest_id == max(token for pairs in everything(direct) for token, _, _ in pairs[1:])


def test_progress_shows_records_tokens_and_speed(tmp_path, lines, capsys):
    prepare(corpus(lines), BYTES, tmp_path / "p", every_seconds=0.0)
    tokens = PreparedReader(tmp_path / "p", BYTES).manifest.tokens
    assert re.search(rf"100%  70 records  {tokens:,} tokens  [0-9,]+ tokens/s  elapsed 0 s", capsys.readouterr().out)


@pytest.mark.parametrize("count", [3, None])
def test_all_cores_are_used_if_the_system_does_not_report_a_processs_own(tmp_path, lines, monkeypatch, count):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: count)
    prepare(corpus(lines), BYTES, tmp_path / "p")
    assert len(PreparedReader(tmp_path / "p", BYTES)) == 70


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BLOCK_BYTES", 100)
    prepare(corpus(lines), BYTES, tmp_path / "one")
    prepare(corpus(lines), BYTES, tmp_path / "two", processes=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["00000.array_record", "manifest.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_records_are_spread_over_shards(tmp_path, lines, monkeypatch):
    monkeypatch.setattr("memjax.data.prepared.store._SHARD_BYTES", 1000)
    prepare(corpus(lines), BYTES, tmp_path / "p")
    reader = PreparedReader(tmp_path / "p", BYTES)
    assert len(reader.manifest.shards) > 2
    whole = everything(reader)
    assert whole == everything(TextReader(corpus(lines).lines, BYTES))
    order = np.random.default_rng(0).permutation(70).tolist()
    assert [pairs.tolist() for pairs in reader(order, np.random.default_rng(0)).split()] == [whole[i] for i in order]


BROKEN = {
    "bad JSON": (b'{"text": "x"', "not JSON"),
    "bad UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "not UTF-8"),
    "NUL": (b"\0" * 50, "not JSON"),
    "NUL in a string": (b'{"text": "a\0b"}', "not JSON"),
    "an empty text": (b'{"text": ""}', "'text' is an empty string"),
    "a missing key": (b'{"body": "x"}', r"has the fields \['body'\]"),
    "null": (b'{"text": null}', "'text' is a null"),
    "half a surrogate pair": (b'{"text": "\\udc00"}', "half of a surrogate pair"),
    "two objects in a line": (b'{"text": "x"} {"text": "y"}', "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "a cut line of 10 MB": (b'{"text": "' + b"x" * 10_000_000, "not JSON"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_refused_or_left_out_and_counted(tmp_path, name, packed):
    line, what = BROKEN[name]
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    data = b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}'
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    with pytest.raises(DataError, match=rf"a\.jsonl(\.gz)?:3: .*{what}.*data\.malformed=skip"):
        prepare(corpus(path), BYTES, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    prepare(corpus(path, malformed="skip"), BYTES, tmp_path / "p")
    reader = PreparedReader(tmp_path / "p", BYTES)
    # A skipped record keeps its index but has no tokens.
    assert [len(pairs) for pairs in reader(range(3), np.random.default_rng(0)).split()] == [6, 0, 5]
    assert ["".join(segment.text for segment in reader.record(i)) for i in range(len(reader))] == ["first", "", "last"]
    assert (reader.manifest.malformed, reader.manifest.usable, reader.manifest.tokens) == (1, 2, 11)
    (example,) = reader.manifest.examples
    assert example.startswith(f"{path}:3: ")


WHOLE = {
    "a byte order mark": b'\xef\xbb\xbf{"text": "x"}\n{"text": "y"}\n',
    "no last line end": b'{"text": "x"}\n{"text": "y"}',
    "Windows line ends": b'{"text": "x"}\r\n{"text": "y"}\r\n',
    "blank lines": b'\n\n{"text": "x"}\n \t\n{"text": "y"}\n\n',
    "an escaped NUL": b'{"text": "x"}\n{"text": "\\u0000y"}',
    "a line of 10 MB": b'{"text": "' + b"x" * 10_000_000 + b'"}\n{"text": "y"}',
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_only_looks_broken_is_read(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(WHOLE[name])
    prepare(corpus(tmp_path / "a.jsonl"), BYTES, tmp_path / "p")
    reader = PreparedReader(tmp_path / "p", BYTES)
    first, second = reader([0, 1], np.random.default_rng(0)).split()
    assert set(first[1:, 0]) == {ord("x") + 3}
    assert bytes(second[1:, 0] - 3).strip(b"\0") == b"y"
    assert reader.manifest.malformed == 0


@pytest.fixture
def broken_folder(tmp_path):
    """A folder of intact files with 4 records in all, mixed with empty, truncated and foreign files."""
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "0.jsonl").write_text("")
    (folder / "1.jsonl").write_text('{"text": "a"}\n')
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n' * 2)[:-9])
    (folder / "3.jsonl.xz").write_bytes(b"not packed")
    (folder / "4.parquet").write_bytes(b"PAR1")
    (folder / "5.txt").write_bytes("café\nfine\n".encode("latin-1"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c", None, ""]}), folder / "6.parquet")
    (folder / "7.txt").write_bytes(b"d\0e\nf\n")
    return folder


def test_broken_files_of_a_folder_are_left_out_and_counted_one_by_one(tmp_path, broken_folder, capsys):
    skipping = corpus(broken_folder, malformed="skip", damaged_files="skip")
    prepare(skipping, BYTES, tmp_path / "p")
    reader = open_prepared(tmp_path / "p", skipping, BYTES)
    texts = [segment.text for i in range(len(reader)) for segment in reader.record(i)]
    assert [text for text in texts if text != "b"] == ["a", "fine", "c", "f"]
    assert texts.count("b") <= 2
    places = [example.removeprefix(f"{broken_folder}/").split(": ")[0] for example in reader.manifest.examples]
    lost = texts.count("b") + 1
    assert places == ["0.jsonl:1", f"2.jsonl.gz:{lost}", "3.jsonl.xz:1", "4.parquet:1", "5.txt:1", "6.parquet:2",
                      "6.parquet:3", "7.txt:1"]  # fmt: skip
    assert reader.manifest.malformed == 8


def test_broken_files_of_a_folder_are_refused_at_the_first(tmp_path, broken_folder):
    for place in ("0.jsonl:1", "2.jsonl.gz:", "3.jsonl.xz:1", "4.parquet:1", "5.txt:1", "6.parquet:2", "7.txt:1"):
        with pytest.raises(DataError, match=f"many/{place}"):
            prepare(corpus(broken_folder), BYTES, tmp_path / "p")
        (broken_folder / place.partition(":")[0]).unlink()
    prepare(corpus(broken_folder), BYTES, tmp_path / "p")
    assert len(PreparedReader(tmp_path / "p", BYTES)) == 1


def test_too_many_malformed_records_end_it(tmp_path, broken_folder):
    with pytest.raises(DataError, match=r"more than data\.max_malformed=7 .*7\.txt:1(.|\n)*The first:\n.*0\.jsonl:1"):
        prepare(corpus(broken_folder, malformed="skip", damaged_files="skip", max_malformed=7), BYTES, tmp_path / "p")
    prepare(corpus(broken_folder, malformed="skip", damaged_files="skip", max_malformed=8), BYTES, tmp_path / "p")
    with pytest.raises(DataError, match="max_malformed=7 here, 8 in the prepared data"):
        open_prepared(
            tmp_path / "p", corpus(broken_folder, malformed="skip", damaged_files="skip", max_malformed=7), BYTES
        )


def test_no_usable_record_is_an_error_in_both_modes(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match=r"no record can be used; set data\.path"):
        prepare(corpus(tmp_path / "a.jsonl", malformed="skip"), BYTES, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_finished_preparation_is_kept_and_an_unfinished_one_redone(tmp_path, lines, capsys):
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "00000.array_record").write_bytes(b"half")
    prepare(corpus(lines), BYTES, tmp_path / "p")
    assert "removing an unfinished preparation and starting again" in capsys.readouterr().out
    assert not (tmp_path / "p.partial").exists()
    before = (tmp_path / "p" / "00000.array_record").stat().st_mtime_ns
    prepare(corpus(lines), BYTES, tmp_path / "p")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "p" / "00000.array_record").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, lines):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("three years of work")
    with pytest.raises(DataError, match=r"holds no prepared data; remove it, or name another data\.prepared"):
        prepare(corpus(lines), BYTES, tmp_path / "p")
    assert (tmp_path / "p" / "thesis.txt").exists()


def test_a_full_disk_is_reported_as_such(tmp_path, lines, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.store, "write_manifest", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"p: cannot be written \(.*No space left.*\); make room"):
        prepare(corpus(lines), BYTES, tmp_path / "deep" / "p")
    assert sorted(tmp_path.iterdir()) == before, "partial output was left on the full disk"


def test_a_second_process_waits_for_the_first(tmp_path, lines, monkeypatch, capsys):
    inner, entered, go_on = prepare_module._prepare, threading.Event(), threading.Event()

    def slow(*arguments):
        entered.set()
        assert go_on.wait(30)
        inner(*arguments)

    monkeypatch.setattr(prepare_module, "_prepare", slow)
    threads = [threading.Thread(target=prepare, args=(corpus(lines), BYTES, tmp_path / "p")) for _ in range(2)]
    threads[0].start()
    assert entered.wait(30)
    entered.clear()
    threads[1].start()
    due = time.monotonic() + 20
    while "waiting for another process" not in capsys.readouterr().out:
        assert time.monotonic() < due, "it does not wait"
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert not entered.is_set(), "the data was prepared twice"
    assert len(PreparedReader(tmp_path / "p", BYTES)) == 70


PROGRAM = """
import pathlib, sys
from memjax.data.prepared import prepare as preparation
from memjax.data.sources.corpus import Corpus
from memjax.data.sources.parsing import Keys
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.io.console import log_to_console
if __name__ == "__main__":
    log_to_console()
    preparation._BLOCK_BYTES = 1000
    corpus = Corpus(name="training", path=sys.argv[1], source="files", field="data.path")
    preparation.prepare(corpus, ByteTokenizer(), pathlib.Path(sys.argv[2]), processes=1, every_seconds=0.0)
"""


def test_a_killed_preparation_is_begun_again(tmp_path):
    path, program = tmp_path / "a.txt", tmp_path / "program.py"
    path.write_text("\n".join(f"{i:06d}" for i in range(20_000)))
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(path), str(tmp_path / "p")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **HERE}) as process:
        assert process.stdout is not None
        while "records" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "p.partial").exists()
    assert not (tmp_path / "p").exists()
    prepare(corpus(path), BYTES, tmp_path / "p")
    reader = PreparedReader(tmp_path / "p", BYTES)
    assert len(reader) == 20_000
    assert reader.record(19_999)[0].text == "019999"
    assert not (tmp_path / "p.partial").exists()


INTERRUPTED = """
import pathlib, sys
from memjax.data.prepared import prepare as preparation
from memjax.data.sources.corpus import Corpus
from memjax.data.sources.parsing import Keys
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.io.console import log_to_console
from memjax.io.ctrl_c import run_command

def main():
    log_to_console()
    corpus = Corpus(name="training", path=sys.argv[1], source="files", field="data.path")
    preparation.prepare(corpus, ByteTokenizer(), pathlib.Path(sys.argv[2]), processes=2, every_seconds=0)

if __name__ == "__main__":
    run_command(main)
"""


@pytest.mark.usefixtures("heeding_hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_is_reported_once(tmp_path, number):
    path, program = tmp_path / "a.txt", tmp_path / "program.py"
    path.write_text("\n".join(f"{i:06d}" for i in range(200_000)))
    program.write_text(INTERRUPTED)
    command = [sys.executable, str(program), str(path), str(tmp_path / "p")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **HERE},
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("preparing")
        time.sleep(0.3)  # by now the tokenising processes are importing modules
        os.killpg(process.pid, number)
        assert process.communicate(timeout=60)[0] == "\ninterrupted\n"
    assert process.returncode == 130
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "program.py"]


STARTED = """
import multiprocessing, os, pathlib, sys, threading, time
from memjax.data.prepared.prepare import prepare
from memjax.data.sources.corpus import Corpus
from memjax.data.tokenizers.base import ByteTokenizer

here = pathlib.Path(sys.argv[1])

def wait_until(done):
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.02)

def bytes_of(_):
    return ByteTokenizer()

class Large(ByteTokenizer):
    def __reduce__(self):
        return bytes_of, (os.urandom(1 << 20),)  # more than a pipe holds

if __name__ == "__main__":
    def let_them_go_on():
        wait_until(lambda: len(multiprocessing.active_children()) == 3)
        (here / "all are started").touch()

    threading.Thread(target=let_them_go_on).start()
    corpus = Corpus(name="training", path=str(here / "a.txt"), source="files", field="data.path")
    prepare(corpus, Large(), here / "p", processes=3)
else:
    assert not {"jax", "grain"} & sys.modules.keys(), "each process imports them"
    wait_until((here / "all are started").exists)
"""


def test_processes_start_at_the_same_time_and_without_jax(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{i:06d}" for i in range(2_000)))
    (tmp_path / "program.py").write_text(STARTED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **HERE},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(PreparedReader(tmp_path / "p", BYTES)) == 2_000


def test_a_killed_process_is_reported_as_such(tmp_path, lines):
    before = {*tmp_path.iterdir()}

    def kill_first():
        while not (found := multiprocessing.active_children()):
            time.sleep(0.01)
        for process in found:
            process.kill()

    thread = threading.Thread(target=kill_first)
    thread.start()
    with pytest.raises(DataError, match="a process that tokenises ended with exit code -9; likely a lack of memory"):
        prepare(corpus(lines), BYTES, tmp_path / "p", processes=3)
    thread.join()
    assert {*tmp_path.iterdir()} - before <= {tmp_path / "p.lock"}


HERE = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
CHANGES = {
    "another tokenizer": ({}, "tokenizer='.*' here, '.*' in the prepared data.*vocab_size=259 here, 2"),
    "another key": ({"text_key": "body"}, "text='body' here, 'text' in the prepared data"),
    "another mode": ({"malformed": "skip"}, "malformed='skip' here, 'strict' in the prepared data"),
    "another source": ({"source": "text"}, "source='text' here, 'files' in the prepared data"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_with_both_values(tmp_path, lines, name):
    change, message = CHANGES[name]
    tokenizer = train_bpe(["y y"] * 9, 261) if name == "another tokenizer" else BYTES
    prepare(corpus(lines), tokenizer, tmp_path / "p")
    with pytest.raises(DataError, match=f"the prepared data does not fit: .*{message}.*; change it back"):
        open_prepared(tmp_path / "p", corpus(lines, **change), BYTES)


def test_other_files_are_refused_and_missing_ones_are_not_missed(tmp_path, lines):
    prepare(corpus(lines), BYTES, tmp_path / "p")
    lines.rename(tmp_path / "b.jsonl")
    assert len(open_prepared(tmp_path / "p", corpus(lines), BYTES)) == 70
    with pytest.raises(DataError, match=r"files 1 of .* here, 1 of .* \(not the same: a\.jsonl, b\.jsonl"):
        open_prepared(tmp_path / "p", corpus(tmp_path / "b.jsonl"), BYTES)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}')
    (tmp_path / "b.jsonl").rename(lines)
    with pytest.raises(DataError, match=r"not the same: a\.jsonl"):
        open_prepared(tmp_path / "p", corpus(lines), BYTES)


def test_damaged_prepared_data_is_refused(tmp_path, lines):
    prepare(corpus(lines), BYTES, tmp_path / "p")
    shard, manifest = tmp_path / "p" / "00000.array_record", tmp_path / "p" / "manifest.json"
    whole, content = shard.read_bytes(), json.loads(manifest.read_text())
    ((_, _, count),) = content["shards"]
    content["shards"][0][2] = count - 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"damaged \({count} records, {count - 1} in the manifest\); delete the"):
        everything(PreparedReader(tmp_path / "p", BYTES))
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"has {len(whole) - 1} bytes, {len(whole)} were written; delete the folder"):
        PreparedReader(tmp_path / "p", BYTES)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match=r"00000\.array_record: damaged .*; delete the folder"):
        everything(PreparedReader(tmp_path / "p", BYTES))
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.array_record: is missing; delete the folder"):
        PreparedReader(tmp_path / "p", BYTES)
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="format=9 here, 1 is what this version reads"):
        PreparedReader(tmp_path / "p", BYTES)
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        PreparedReader(tmp_path / "p", BYTES)


GOOD = store.encode_record([([5, 6], False), ([7], True)], store.id_dtype(259))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\0\0",
        bytes(4) + b"ab",
        b"\xff" * 12,
        GOOD[:10],
        GOOD[:-1],
        GOOD[:-2],
        GOOD + b"ab",
        b"\x01" + GOOD[1:],
        b"\x03" + GOOD[1:],
        GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:],
    ],
)
def test_a_record_whose_lengths_do_not_add_up_is_named(tmp_path, lines, record):
    prepare(corpus(lines), BYTES, tmp_path / "p")
    manifest = PreparedReader(tmp_path / "p", BYTES).manifest
    writer = store.Writer(tmp_path / "p")
    for content in (GOOD, record, GOOD):
        writer.write(content)
    store.write_manifest(tmp_path / "p", dataclasses.replace(manifest, shards=writer.finish(), usable=3))
    reader, rng = PreparedReader(tmp_path / "p", BYTES), np.random.default_rng(0)
    assert [pairs.tolist() for pairs in reader([2, 0], rng).split()] == [
        [[1, 5, 0], [5, 6, 0], [6, 7, 1], [7, 2, 1]]
    ] * 2
    for numbers in ([1], [0, 1, 2], [2, 1]):
        with pytest.raises(DataError, match="record 1 is damaged; delete the folder"):
            reader(numbers, rng)


def test_ids_past_the_vocabulary_are_refused_before_they_are_used(tmp_path, lines):
    larger = train_bpe(["yy yyyy é1 é2 é3"] * 9, 280)
    prepare(corpus(lines), larger, tmp_path / "p")
    reader = PreparedReader(tmp_path / "p", BYTES)
    with pytest.raises(DataError, match=r"record \d+ holds the id \d+, the tokenizer has 259") as error:
        everything(reader)
    (number,) = map(int, re.findall(r"record (\d+)", str(error.value)))
    with pytest.raises(DataError, match=f"record {number} holds"):
        reader([number], np.random.default_rng(0))
    manifest = reader.manifest
    path = tmp_path / "p" / "manifest.json"
    content = {"format": 1, **dataclasses.asdict(manifest)}
    content["settings"] |= {"tokenizer": BYTES.fingerprint, "vocab_size": 259}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"vocab_size=259 here, an id {manifest.largest_id} in the prepared data"):
        open_prepared(tmp_path / "p", corpus(lines), BYTES)


def test_settings_of_the_config_reach_the_corpus():
    assert Keys.of(DataConfig(text_key="a", prompt_key="b", answer_key="c")) == Keys("a", "b", "c")


def test_a_lost_part_of_a_file_ends_a_preparation_that_skips_records_unless_it_may_be_lost(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": bytes(rng.integers(97, 123, 200, np.uint8)).decode()}).encode() for _ in range(1000)]
    packed = gzip.compress(b"\n".join(lines))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cut off or damaged here.*what follows is lost.*data\.damaged_files=skip"):
        prepare(corpus(path, malformed="skip"), BYTES, tmp_path / "p")
    prepare(corpus(path, malformed="skip", damaged_files="skip"), BYTES, tmp_path / "p")
    (example,) = PreparedReader(tmp_path / "p", BYTES).manifest.examples
    assert "what follows is lost" in example


@pytest.mark.parametrize("change", ["nothing", "tokenizer", "settings", "file"])
@pytest.mark.parametrize("asked_for", [True, False])
def test_only_what_a_start_with_other_settings_prepared_is_discarded(tmp_path, lines, asked_for, change):
    folder = tmp_path / "p"
    prepare(corpus(lines), BYTES, folder, asked_for=asked_for)
    if change == "file":
        lines.write_text(json.dumps({"text": "x"}))
    now = corpus(lines, malformed="skip") if change == "settings" else corpus(lines)
    discard_outdated(now, train_bpe(["y é"] * 9, 260) if change == "tokenizer" else BYTES, folder)
    assert folder.exists() == (asked_for or change == "nothing")
    assert {path.name for path in tmp_path.iterdir()} <= {"p", lines.name}


def test_data_that_prepare_asked_for_is_kept_whoever_made_it(tmp_path, lines):
    prepare(corpus(lines), BYTES, tmp_path / "p", asked_for=False)
    prepare(corpus(lines), BYTES, tmp_path / "p", asked_for=True)
    discard_outdated(corpus(lines, malformed="skip"), BYTES, tmp_path / "p")
    assert len(PreparedReader(tmp_path / "p", BYTES)) == 70


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": [1]},
        {"files": [[["a"]]]},
        {"files": 0.5},
        {"shards": [["../00000.array_record", 1, 1]]},
        {"shards": [["00000.array_record", 1, -1]]},
        {"largest_id": "x"},
        {"examples": None},
        {"unknown" * 500: 1},
    ],
)
def test_an_invalid_manifest_is_reported_in_one_line(tmp_path, lines, change):
    prepare(corpus(lines), BYTES, tmp_path / "p")
    manifest = tmp_path / "p" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read .*; delete the folder") as error:
        open_prepared(tmp_path / "p", corpus(lines), BYTES)
    assert len(str(error.value)) < 1000
