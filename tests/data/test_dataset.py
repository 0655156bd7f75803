"""Mixtures: token shares, held-out records, and the same batches after kill -9 with any number of workers."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import memjax.data.sources.lines
from memjax.config.data import DataConfig, MixtureConfig, TokenizerConfig
from memjax.data.dataset import open_dataset, train_tokenizer
from memjax.data.loader import TrainingData
from memjax.data.mixture import SplitRecords
from memjax.data.sources.kinds import find_source
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.errors import DataError

BYTES = ByteTokenizer()
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def mixture(tmp_path):
    """Files of three kinds: 60 short records (a), 20 long ones (p) and 40 in two files (t), weighted 1, 2 and 1."""
    rows = [json.dumps({"text": f"a{i:02d}"}) for i in range(60)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    table = pyarrow.table({"text": [f"p{i:02d}" + "-" * (20 + i) for i in range(20)]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "0.txt").write_text("\n".join(f"t{i:02d}......" for i in range(30)))
    writer = ArrayRecordWriter(str(tmp_path / "t" / "1.array_record"), "group_size:1")
    for i in range(30, 40):
        writer.write(f"t{i:02d}......".encode())
    writer.close()
    return DataConfig(
        source="mixture",
        mixture=(
            MixtureConfig(name="a", path=str(tmp_path / "a.jsonl.gz")),
            MixtureConfig(name="p", path=str(tmp_path / "p.parquet"), weight=2.0),
            MixtureConfig(name="t", path=str(tmp_path / "t"), source="text"),
        ),
        prepared=str(tmp_path / "prepared"),
        validation_fraction=0.1,
        batch_size=4,
        sequence_length=48,
        packing="concat",
        tokenizer=TokenizerConfig(kind="byte"),
    )


def take(config, count):
    data = TrainingData(open_dataset(config, BYTES), seed=3)
    batches = [next(data) for _ in range(count)]
    data.close()
    return batches


def texts_of(batches):
    """Decodes the whole records, delimited by begin tokens, of batches packed by `concat`."""
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    begins = np.flatnonzero(tokens == 1)
    return [BYTES.decode(tokens[start:stop].tolist()) for start, stop in itertools.pairwise(begins)]


@pytest.mark.parametrize("packing", ["none", "concat", "first_fit"])
def test_every_token_knows_its_part(mixture, packing):
    for batch in take(dataclasses.replace(mixture, packing=packing), 5):
        assert batch["sources"].dtype == np.int32
        for tokens, segments, sources in zip(batch["tokens"], batch["segments"], batch["sources"], strict=True):
            for segment in range(1, segments.max() + 1):
                text = BYTES.decode(tokens[segments == segment].tolist())
                (source,) = set(sources[segments == segment].tolist())
                if text:
                    # A row may begin inside a record; its filler characters also identify the source.
                    assert source in {"a": [0], "p": [1], "-": [1], "t": [2], ".": [2]}.get(text[0], [0, 1, 2])


def test_weights_are_shares_of_the_tokens(mixture):
    sources = np.concatenate([batch["sources"].ravel() for batch in take(mixture, 40)])
    shares = np.bincount(sources) / len(sources)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)


def test_each_part_has_its_own_epochs_without_its_held_out_records(mixture):
    texts = texts_of(take(mixture, 25))
    for letter, count in (("a", 54), ("p", 18), ("t", 36)):
        names = [text[:3] for text in texts if text[:1] == letter]
        whole = {f"{letter}{i:02d}" for i in range(count)}
        epochs = [names[at : at + count] for at in range(0, len(names) - count, count)]
        assert epochs
        assert all(set(epoch) == whole for epoch in epochs)
    records = SplitRecords(open_dataset(mixture, BYTES).validation)
    names = [records[i][0].text[:3] for i in range(len(records))]
    assert names == [*(f"a{i}" for i in range(54, 60)), "p18", "p19", *(f"t{i}" for i in range(36, 40))]


def test_validation_mixes_what_is_held_out_and_is_the_same_every_time(mixture):
    first, again = ([*open_dataset(mixture, BYTES).validation_batches(9)] for _ in range(2))
    assert first
    assert all(np.array_equal(one[name], two[name]) for one, two in zip(first, again, strict=True) for name in one)
    held_out = {*(f"a{i}" for i in range(54, 60)), "p18", "p19", *(f"t{i}" for i in range(36, 40))}
    found = {text[:3] for text in texts_of(first)} - {""}
    assert found <= held_out
    assert {name[0] for name in found} == {"a", "p", "t"}


def test_validation_may_have_its_own_files(mixture, tmp_path):
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress(b"v0\nv1"))
    config = dataclasses.replace(mixture, validation_path=str(tmp_path / "v.txt.gz"))
    dataset = open_dataset(config, BYTES)
    assert [split.stop for split in dataset.train] == [60, 20, 40]
    assert [record[0].text for record in SplitRecords(dataset.validation)] == ["v0", "v1"]


def test_a_place_in_another_mixture_is_refused(mixture):
    data = TrainingData(open_dataset(mixture, BYTES), seed=3)
    state = json.loads(json.dumps(data.get_state()))
    data.close()
    parts = (*mixture.mixture[:2], dataclasses.replace(mixture.mixture[2], weight=5.0))
    other = TrainingData(open_dataset(dataclasses.replace(mixture, mixture=parts), BYTES), seed=3)
    with pytest.raises(DataError, match=r"mixture=.*'weight': 5\.0.* here, .*'weight': 1\.0.* in the checkpoint"):
        other.set_state(state)
    other.close()


def test_malformed_records_of_all_parts_are_counted_and_reported(mixture, tmp_path):
    assert open_dataset(mixture, BYTES).malformed_counts() == {}
    (tmp_path / "t" / "2.txt").write_bytes(b"t40\xff\nt41\n")
    config = dataclasses.replace(mixture, malformed="skip", prepared=str(tmp_path / "other"))
    dataset = open_dataset(config, BYTES)
    assert dataset.malformed_counts() == {"data/malformed": 1}
    lines = dataset.describe()
    assert "41 records" in lines[2]
    assert lines[2].endswith("1 malformed records skipped, such as")
    assert "2.txt:1: not UTF-8" in lines[3]


def test_files_that_cannot_be_read_at_random_need_a_folder(mixture):
    path = mixture.mixture[0].path
    with pytest.raises(DataError, match=r"data\.prepared is not set; .*a\.jsonl\.gz must be prepared"):
        open_dataset(DataConfig(source="jsonl", path=path), BYTES)


def test_prepared_data_gives_the_batches_of_the_file(mixture, tmp_path):
    lines = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())
    (tmp_path / "a.jsonl").write_bytes(lines)
    plain = dataclasses.replace(mixture, source="jsonl", mixture=(), path=str(tmp_path / "a.jsonl"))
    packed = dataclasses.replace(plain, path=str(tmp_path / "a.jsonl.gz"), prepared=str(tmp_path / "packed"))
    for one, two in zip(take(plain, 10), take(packed, 10), strict=True):
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_tokenizer_is_trained_on_every_part_by_its_weight(mixture, tmp_path):
    words = {"a": "qzax ", "p": "wkpx ", "t": "vjtx "}
    parts = []
    for name, word in words.items():
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(b"\n".join([word.encode() * 20] * 500)))
        parts.append(
            MixtureConfig(name=name, path=str(tmp_path / f"{name}.txt.gz"), weight=3.0 if name == "p" else 1.0)
        )
    tokenizer = TokenizerConfig(kind="bpe", train_bytes=5000)
    config = dataclasses.replace(mixture, mixture=tuple(parts), tokenizer=tokenizer)
    trained = train_tokenizer(config, 400)
    assert all(len(trained.encode(word.strip())) == 1 for word in words.values())
    assert trained.fingerprint == train_tokenizer(config, 400).fingerprint


PROGRAM = """
import dataclasses, hashlib, json, sys
from memjax.config.data import DataConfig, MixtureConfig
from memjax.data.dataset import open_dataset
from memjax.data.loader import TrainingData
from memjax.data.tokenizers.base import ByteTokenizer
if __name__ == "__main__":
    fields, places = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    fields["mixture"] = tuple(MixtureConfig(**part) for part in fields["mixture"])
    config = DataConfig(**fields)
    streams = [
        TrainingData(open_dataset(dataclasses.replace(config, num_workers=workers), ByteTokenizer()), seed=3)
        for workers in (0, 1, 2)
    ]
    for stream, place in zip(streams, places):
        stream.set_state(place)
    while True:
        line = []
        for stream in streams:
            place = stream.get_state()
            batch = next(stream)
            digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
            line.append([place, digest])
        print(json.dumps(line), flush=True)
"""


def batches_until_killed(folder, config, places, count):
    """Reads (place before, digest) of batches at 0, 1 and 2 workers from a separate process, then kills it."""
    fields = dataclasses.asdict(config)
    del fields["tokenizer"], fields["biographies"]
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(folder / "program.py"), json.dumps(fields), json.dumps(places)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        found = []
        for line in process.stdout:
            if line.startswith("["):
                found.append(json.loads(line))
            if len(found) == count:
                process.kill()
                break
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    return found


@pytest.mark.slow
def test_a_mixture_resumes_exactly_after_kill_9_at_any_number_of_workers(tmp_path, mixture):
    config = dataclasses.replace(mixture, packing="first_fit")
    straight = batches_until_killed(tmp_path, config, [], 40)
    resumed = batches_until_killed(tmp_path, config, [place for place, _ in straight[23]], 17)
    assert resumed == straight[23:]
    for workers in range(3):
        assert len({line[workers][1] for line in straight}) == 40
    here = [hashlib.sha256(b"".join(b[n].tobytes() for n in sorted(b))).hexdigest() for b in take(config, 40)]
    assert here == [line[0][1] for line in straight]


def test_a_run_opens_its_files_once_however_often_it_validates(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i} some words" for i in range(100)))
    scanned, read, real = [], [], memjax.data.sources.lines._line_bounds

    def counted(handle, size):
        scanned.append(size)
        return real(handle, size)

    class Counted(memjax.data.sources.lines._OpenFile):
        def __init__(self, path):
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(memjax.data.sources.lines, "_line_bounds", counted)
    monkeypatch.setattr(memjax.data.sources.lines, "_OpenFile", Counted)
    config = DataConfig(source="text", path=str(path), validation_fraction=0.1, batch_size=4, sequence_length=32)
    source = find_source(config)
    dataset = open_dataset(source, train_tokenizer(source, 300))
    data = TrainingData(dataset, seed=0)
    for _ in range(3):
        next(data)
        assert list(dataset.validation_batches(2))
    data.close()
    assert len(scanned) == 1
    assert len(read) == 2  # once to scan it, once to read it


def test_a_packed_validation_file_goes_with_a_plain_training_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n' * 20)
    (tmp_path / "v.jsonl.xz").write_bytes(lzma.compress(b'{"text": "v"}\n' * 3))
    config = DataConfig(
        source="jsonl",
        path=str(tmp_path / "a.jsonl"),
        validation_path=str(tmp_path / "v.jsonl.xz"),
        prepared=str(tmp_path / "prepared"),
        tokenizer=TokenizerConfig(kind="bpe"),
    )
    dataset = open_dataset(config, train_tokenizer(config, 300))
    assert [record[0].text for record in SplitRecords(dataset.validation)] == ["v"] * 3
    assert not (tmp_path / "prepared" / "training").exists()


def test_training_records_that_were_all_left_out_are_named(tmp_path):
    lines = ['{"x": 1}\n'] * 8 + ['{"text": "a b"}\n'] * 2
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = DataConfig(
        source="jsonl",
        path=str(tmp_path / "a.jsonl"),
        prepared=str(tmp_path / "prepared"),
        malformed="skip",
        validation_fraction=0.2,
    )
    with pytest.raises(DataError, match=r"a\.jsonl: none of the first 8 records, which are those for training"):
        open_dataset(config, BYTES)
    assert len(open_dataset(dataclasses.replace(config, validation_fraction=0.1), BYTES).validation) == 1


@pytest.mark.parametrize(("packing", "told"), [("none", "steps read 2 epochs"), ("concat", "read about 3.2 epochs")])
def test_records_tokens_and_epochs_are_reported(tmp_path, packing, told):
    (tmp_path / "a.txt").write_text("123456789\n" * 42)
    config = DataConfig(
        source="text",
        path=str(tmp_path / "a.txt"),
        validation_fraction=0.05,
        packing=packing,
        batch_size=4,
        sequence_length=16,
    )
    (line,) = open_dataset(config, BYTES).describe(steps=20)
    assert line.startswith("records    40 for training, 400 tokens; 20 steps")
    assert told in line
    assert line.endswith("epochs; 2 records for validation")
    (tmp_path / "a.txt").write_text("123456789\n" * 4200)
    assert "3,990 for training, about 40,000 tokens;" in open_dataset(config, BYTES).describe(steps=20)[0]
