import collections
import dataclasses
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from memjax.config.data import BiographiesConfig, DataConfig, TokenizerConfig
from memjax.data.dataset import open_dataset, train_tokenizer
from memjax.data.loader import TrainingData
from memjax.data.mixture import SplitRecords
from memjax.data.sources.biographies import questions
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.data.tokenizers.bpe import BpeTokenizer
from memjax.errors import DataError

BYTES: Tokenizer = ByteTokenizer()
BIOGRAPHIES = DataConfig(
    biographies=BiographiesConfig(num_people=20),
    batch_size=8,
    sequence_length=96,
    packing="none",
    tokenizer=TokenizerConfig(kind="byte"),
)
kinds = pytest.mark.parametrize("packing", ["none", "concat", "first_fit"])


@pytest.fixture
def text_config(tmp_path):
    """53 training records of up to 40 characters, each with a unique number."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i:03d}" + "x" * (i * 7 % 38) for i in range(54)))
    return DataConfig(
        source="text",
        path=str(path),
        batch_size=4,
        sequence_length=48,
        packing="none",
        tokenizer=TokenizerConfig(kind="byte"),
    )


def take(config, count, *, seed=0, state=None, tokenizer: Tokenizer = BYTES):
    data = TrainingData(open_dataset(config, tokenizer), seed=seed)
    try:
        if state is not None:
            data.set_state(state)
        return list(itertools.islice(data, count))
    finally:
        data.close()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def texts_of(batches):
    """Decodes each record of batches that hold whole records."""
    texts = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            texts += [BYTES.decode(tokens[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return texts


def is_same(first, second):
    return all(np.array_equal(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one)


@kinds
def test_a_place_is_found_again_after_any_number_of_batches(text_config, packing, monkeypatch):
    # Small blocks, so that places fall inside, between and at the ends of blocks.
    monkeypatch.setattr("memjax.data.packing._BLOCK", 5)
    monkeypatch.setattr("memjax.data.packers._NUM_BINS", 6)
    config = dataclasses.replace(text_config, packing=packing)
    data = TrainingData(open_dataset(config, BYTES), seed=0)
    states, batches = [], []
    for _ in range(18):
        states.append(json.dumps(data.get_state()))
        batches.append(next(data))
    data.close()
    for k, state in enumerate(states[:-2]):
        assert_same(take(config, 2, state=json.loads(state)), batches[k : k + 2])


def test_concat_is_found_again_where_a_record_ends_with_a_row(tmp_path):
    # Every third record ends exactly with a row; the empty remainder must survive the round trip through JSON.
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i:03d}" for i in range(40)))
    config = DataConfig(source="text", path=str(path), batch_size=1, sequence_length=8, packing="concat")
    data = TrainingData(open_dataset(config, BYTES), seed=0)
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(data.get_state())))
        batches.append(next(data))
    data.close()
    for k, state in enumerate(states[:-2]):
        assert_same(take(config, 2, state=state), batches[k : k + 2])


def test_a_place_within_a_run_is_found_again_in_the_same_object():
    data = TrainingData(open_dataset(BIOGRAPHIES, BYTES), seed=0)
    next(data)
    state = data.get_state()
    first = [next(data), next(data)]
    data.set_state(state)
    assert_same([next(data), next(data)], first)
    data.close()


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["none", "concat"])
def test_two_workers_see_every_record_and_resume_exactly(text_config, packing):
    config = dataclasses.replace(text_config, packing=packing, num_workers=2)
    data = TrainingData(open_dataset(config, BYTES), seed=0)
    states, batches = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(data.get_state())))
        batches.append(next(data))
    assert all(type(array) is np.ndarray for array in batches[0].values())
    for k in (0, 1, 7, 12):
        data.set_state(states[k])
        assert_same([next(data) for _ in range(20 - k)], batches[k:])
    data.close()
    seen = collections.Counter(texts_of(batches))
    assert packing != "none" or set(seen) == {
        record[0].text for record in SplitRecords(open_dataset(config, BYTES).train)
    }


def test_no_batches_come_after_closing():
    data = TrainingData(open_dataset(BIOGRAPHIES, BYTES), seed=0)
    next(data)
    data.close()
    data.close()
    assert list(data) == []


def test_a_program_may_end_without_closing():
    program = """
from memjax.config.data import DataConfig
from memjax.data.dataset import open_dataset
from memjax.data.loader import TrainingData
from memjax.data.tokenizers.base import ByteTokenizer
data = TrainingData(open_dataset(DataConfig(), ByteTokenizer()), seed=0)
next(data)
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")


@pytest.mark.slow
def test_a_bad_line_is_named_from_a_worker_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 30 + "{\n")
    config = DataConfig(source="jsonl", path=str(path), validation_fraction=0.0, batch_size=4, num_workers=1)
    with pytest.raises(DataError, match=r"a\.jsonl:31: not JSON"):
        take(config, 40)


@kinds
def test_a_bad_line_is_named(tmp_path, packing):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 30 + "{\n")
    config = DataConfig(source="jsonl", path=str(path), validation_fraction=0.0, batch_size=4, packing=packing)
    with pytest.raises(DataError, match=r"a\.jsonl:31: not JSON"):
        take(config, 40)


def test_every_epoch_has_every_record_once_in_another_order(text_config):
    whole = [text for text in texts_of(take(text_config, 53)) if text]
    expected = sorted(record[0].text for record in SplitRecords(open_dataset(text_config, BYTES).train))
    epochs = [whole[i * 53 : (i + 1) * 53] for i in range(4)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert expected not in epochs


def test_without_shuffling_records_come_in_file_order(text_config):
    config = dataclasses.replace(text_config, shuffle=False)
    expected = [record[0].text for record in SplitRecords(open_dataset(config, BYTES).train)]
    assert texts_of(take(config, 20)) == (expected * 2)[:80]


@kinds
def test_the_seed_decides(text_config, packing):
    config = dataclasses.replace(text_config, packing=packing)
    first = take(config, 5, seed=1)
    assert_same(first, take(config, 5, seed=1))
    assert not is_same(first, take(config, 5, seed=2))
    take(config, 1, seed=-1)
    take(config, 1, seed=2**40)


def test_biographies_have_new_wordings_in_every_epoch():
    num_records = len(SplitRecords(open_dataset(BIOGRAPHIES, BYTES).train))
    assert num_records == 20 * 6 + 10 * 6
    whole = texts_of(take(BIOGRAPHIES, 2 * num_records // 8))
    first, second = set(whole[:num_records]), set(whole[num_records:])
    assert len(first) > 0.9 * num_records
    assert 0.05 * num_records < len(first & second) < 0.5 * num_records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 1}, "num_workers=1 here, 0 in the checkpoint"),
        ({"batch_size": 6}, "batch_size=6 here, 4 in the checkpoint"),
        ({"packing": "concat"}, "packing='concat' here, 'none' in the checkpoint"),
        ({"validation_fraction": 0.5}, "num_records=27 here, 53 in the checkpoint"),
    ],
)
def test_a_place_in_other_data_is_refused(text_config, change, message):
    data = TrainingData(open_dataset(text_config, BYTES), seed=0)
    state = data.get_state()
    data.close()
    with pytest.raises(DataError, match=message):
        take(dataclasses.replace(text_config, **change), 1, state=state)


def test_a_place_with_another_tokenizer_is_refused(text_config):
    data = TrainingData(open_dataset(text_config, BYTES), seed=0)
    state = data.get_state()
    data.close()
    bpe = train_tokenizer(dataclasses.replace(text_config, tokenizer=TokenizerConfig(kind="bpe")), 270)
    with pytest.raises(DataError, match=f"tokenizer='{bpe.fingerprint}' here, '{BYTES.fingerprint}' in the checkpoint"):
        take(text_config, 1, state=state, tokenizer=bpe)


@kinds
def test_validation_is_the_same_every_time_and_padded_at_the_end(text_config, packing):
    config = dataclasses.replace(text_config, validation_fraction=0.1, packing=packing)
    source = SplitRecords(open_dataset(config, BYTES).validation)
    assert len(source) == 5
    first = list(open_dataset(config, BYTES).validation_batches(9))
    assert_same(first, list(open_dataset(config, BYTES).validation_batches(9)))
    assert all(batch["tokens"].shape == (4, 48) for batch in first)
    assert not first[-1]["segments"][-1].any()
    assert not first[-1]["loss_mask"][-1].any()
    learned = sum(batch["loss_mask"].sum() for batch in first)
    assert learned == sum(len(record[0].text) + 1 for record in source)
    assert len(list(open_dataset(config, BYTES).validation_batches(1))) == 1


def test_there_is_no_validation_when_nothing_is_held_out(text_config):
    config = dataclasses.replace(text_config, validation_fraction=0.0)
    assert list(open_dataset(config, BYTES).validation_batches(3)) == []


def test_biographies_validate_with_questions_never_asked_in_training():
    asked = texts_of(open_dataset(BIOGRAPHIES, BYTES).validation_batches(99))
    expected = questions(BIOGRAPHIES.biographies, False)
    assert asked == [(question.prompt + question.answer) for question in expected]
    trained = " ".join(texts_of(take(BIOGRAPHIES, 60)))
    assert not any(question.prompt in trained for question in expected)
    assert any(question.prompt in trained for question in questions(BIOGRAPHIES.biographies, True))


def test_a_trained_tokenizer_keeps_names_and_values_whole():
    config = DataConfig(biographies=BiographiesConfig(num_people=150), packing="none")
    tokenizer = train_tokenizer(config, 2048)
    assert isinstance(tokenizer, BpeTokenizer)
    assert 1000 < tokenizer.vocab_size <= 2048
    everyone = questions(config.biographies, False) + questions(config.biographies, True)
    for texts in ([question.answer for question in everyone], [" " + question.person.name for question in everyone]):
        encoded = tokenizer.encode_batch(texts)
        assert [len(ids) for ids in encoded] == [len(text.split()) for text in texts]
    lengths = [batch["segments"].sum(axis=1).max() for batch in take(config, 5, tokenizer=tokenizer)]
    assert max(lengths) <= 20  # well below the default sequence_length, so no answer is truncated
    assert tokenizer.fingerprint == train_tokenizer(config, 2048).fingerprint
    assert train_tokenizer(BIOGRAPHIES, 2048).fingerprint == BYTES.fingerprint


def test_a_tokenizer_is_trained_on_texts_from_everywhere(tmp_path):
    path = tmp_path / "a.txt"
    words = [f"{a}{b}zq" for a, b in itertools.product("abcdefghij", "klmnopqrst")]
    path.write_text("\n".join(f"{words[i // 100]} {words[i // 100]}" for i in range(10_000)))
    config = DataConfig(source="text", path=str(path), tokenizer=TokenizerConfig(train_bytes=11_000))
    tokenizer = train_tokenizer(config, 1000)
    assert all(len(tokenizer.encode(word)) == 1 for word in words[:99])


def lines_of(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def jsonl_config(tmp_path):
    """200 records, none of them held out."""
    lines_of(tmp_path / "a.jsonl", (f"{i} fine" for i in range(200)))
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "a.jsonl"),
        prepared=str(tmp_path / "prepared"),
        validation_fraction=0.0,
        batch_size=4,
        sequence_length=32,
        packing="none",
        tokenizer=TokenizerConfig(kind="byte"),
    )


def place_after(config, count):
    data = TrainingData(open_dataset(config, BYTES), seed=0)
    for _ in range(count):
        next(data)
    place = json.loads(json.dumps(data.get_state()))
    data.close()
    return place


def test_other_text_of_as_many_records_is_refused_on_resume(jsonl_config, tmp_path):
    place = place_after(jsonl_config, 3)
    lines_of(tmp_path / "a.jsonl", (f"{i} else" for i in range(200)))
    with pytest.raises(
        DataError, match=r"a\.jsonl holds different text from that of the checkpoint, in as many records"
    ):
        take(jsonl_config, 1, state=place)
    gzipped = dataclasses.replace(jsonl_config, path=str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    place = place_after(gzipped, 3)
    shutil.rmtree(tmp_path / "prepared")
    lines_of(tmp_path / "a.jsonl", (f"{i} more" for i in range(200)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with pytest.raises(DataError, match="the prepared data holds different records from those of the checkpoint"):
        take(gzipped, 1, state=place)


def test_a_place_saved_before_the_content_was_known_is_found_again(jsonl_config):
    place = place_after(jsonl_config, 3)
    expected = take(jsonl_config, 5)[3:]
    del place["data"]
    assert_same(take(jsonl_config, 2, state=place), expected)


@pytest.mark.parametrize("repair", ["replace", "skip"])
def test_the_repairs_that_the_message_for_a_bad_line_names_can_be_resumed(jsonl_config, tmp_path, repair):
    path = tmp_path / "a.jsonl"
    good = take(jsonl_config, 40)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:123], '{"text": "cut', *lines[124:]]))
    data = TrainingData(open_dataset(jsonl_config, BYTES), seed=0)
    before = []
    with pytest.raises(DataError, match=r"a\.jsonl:124: .*replace the line and keep the number.*data\.malformed=skip"):
        before.extend((batch, data.get_state()) for batch in data)
    data.close()
    assert 0 < len(before) < 39
    assert_same([batch for batch, _ in before], good[: len(before)])
    config, left = jsonl_config, 40 - len(before)
    if repair == "replace":
        path.write_text("\n".join([*lines[:123], '{"text": "a longer line than before"}', *lines[124:]]))
    else:
        config = dataclasses.replace(config, malformed="skip")
    after = take(config, left, state=json.loads(json.dumps(before[-1][1])))
    # All other records keep the positions that they have without the bad line.
    for one, other in zip(after, good[len(before) :], strict=True):
        same = np.array([np.array_equal(a, b) for a, b in zip(one["tokens"], other["tokens"], strict=True)])
        assert all(same | (other["tokens"] == BYTES.encode("123 fine")[0]).any(axis=1))
        assert same.sum() >= 3


def test_closing_stops_a_thread_in_the_middle_of_a_batch(tmp_path):
    encoded, waited, begun = [], [], threading.Event()

    class Waiting(ByteTokenizer):
        def encode_batch(self, texts):
            encoded.append(texts)
            begun.set()
            waited.append(stop.wait(60))
            return super().encode_batch(texts)

    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(5000)))
    config = DataConfig(source="text", path=str(path), batch_size=64, sequence_length=512, packing="concat")
    data = TrainingData(open_dataset(config, Waiting()), seed=0)
    finalizer = data._close.peek()
    assert finalizer is not None
    stop = finalizer[2][1]
    data._open[0].start_prefetch()
    assert begun.wait(60)
    data.close()
    assert len(encoded) == 1, "the batch needs many more"
    assert waited == [True], "it was told to stop and did not just run out"
