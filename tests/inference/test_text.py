"""Texts end at their stop strings, in a batch as alone."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn import drawn
from memjax.config.model import ModelConfig
from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference.engine import Engine
from memjax.inference.prefixes import Prompts
from memjax.inference.requests import Request, check
from memjax.inference.text import StopStrings, continue_texts, stream_text
from memjax.models.decoder import Decoder

SAMPLING = SamplingConfig(temperature=1.0, top_k=30, seed=1)
PROMPTS = ["What is", "x", "A longer one", "", "What is"]


@functools.cache
def tiny() -> Decoder:
    config = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32, vocab_size=259, memory=None)
    return drawn(config)


def as_lm_eval_cuts(pieces: list[str], stops: list[str]) -> str:
    """Joins pieces until a stop string is complete, then splits the text at each stop string in turn."""
    text = ""
    for piece in pieces:
        text += piece
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["... ak", " th", "e"], ["e", " the"], "... ak th"),
        (["... ak", " th", "e"], [" the", "e"], "... ak"),
        (["x", "abc"], ["b", "abc"], "xa"),
        (["x", "abc"], ["abc", "b"], "x"),
        (["x", "a", "b", "c"], ["abc", "b"], "xa"),
        (["aab"], ["", "ab"], "a"),
    ],
)
def test_stop_strings_cut_as_lm_eval_cuts(pieces, stops, expected):
    filter_ = StopStrings(stops)
    assert "".join(map(filter_.push, pieces)) + filter_.finish() == expected
    assert expected == as_lm_eval_cuts(pieces, [stop for stop in stops if stop])


@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_is_passed_on_up_to_a_stop_string(pieces, stops):
    filter_, expected = StopStrings(stops), as_lm_eval_cuts(pieces, stops)
    passed = [filter_.push(piece) for piece in pieces]
    for count in range(len(pieces)):
        # Nothing passed on is retracted, and text is held back only if a stop string may begin with it.
        so_far = "".join(passed[: count + 1])
        assert expected.startswith(so_far)
        held = "".join(pieces[: count + 1])[len(so_far) :]
        assert filter_.found is not None or any(stop.startswith(held) for stop in stops) or not held
    assert "".join(passed) + filter_.finish() == expected
    assert (filter_.found is None) == (expected == "".join(pieces))


def test_a_batch_writes_what_is_written_alone():
    model, tokenizer = tiny(), ByteTokenizer()
    alone = [
        "".join(stream_text(model, tokenizer, prompt, max_tokens=12, sampling=SAMPLING, number=number))
        for number, prompt in enumerate(PROMPTS)
    ]
    assert alone[0] != alone[4]
    texts = continue_texts(model, tokenizer, PROMPTS, max_tokens=12, sampling=SAMPLING, batch_size=2)
    for expected, continuation in zip(alone, texts, strict=True):
        assert continuation.text == expected
        assert (continuation.finish == "length") == (continuation.tokens == 12)


@pytest.mark.parametrize("shared", [40, 2])
def test_prompts_that_begin_alike_are_read_once_and_continued_as_alone(shared, monkeypatch):
    model, tokenizer, reused = tiny(), ByteTokenizer(), []
    joining = Prompts.joining

    def recorded(self, request, slot):
        found = joining(self, request, slot)
        reused.append(found.start)
        return found

    monkeypatch.setattr(Prompts, "joining", recorded)
    prompts = [f"{'Examples. ' * (shared // 10)}{number}: {'abc' * (number % 3)}" for number in range(12)]
    options = {"max_tokens": 8, "sampling": SAMPLING, "batch_size": 4}
    texts = [continuation.text for continuation in continue_texts(model, tokenizer, prompts, **options)]
    # The first four have nothing to reuse.
    assert [start >= shared for start in reused] == [shared > 10 and number >= 4 for number in range(12)]
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        alone = stream_text(model, tokenizer, prompt, max_tokens=8, sampling=SAMPLING, number=number)
        assert "".join(alone) == text


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_texts_that_have_ended_make_room_for_others(batch_size, monkeypatch):
    model, tokenizer, read = tiny(), ByteTokenizer(), []
    insert = Engine.insert

    def recorded(self, requests):
        read.append((batch_size - len(self.free_slots), [request.number for request in requests]))
        return insert(self, requests)

    monkeypatch.setattr(Engine, "insert", recorded)
    prompts = [f"{number}" for number in range(19)]
    write = functools.partial(continue_texts, model, tokenizer, max_tokens=30, sampling=SAMPLING, stop=["e", "u", "1"])
    texts = list(write(prompts, batch_size=batch_size))
    assert [number for _, numbers in read for number in numbers] == list(range(19))
    assert max(running + len(numbers) for running, numbers in read) == batch_size
    if batch_size > 1:
        assert any(running and numbers[0] >= batch_size for running, numbers in read)
    assert len({text.tokens for text in texts}) > 3
    read.clear()
    batch_size = 19
    assert list(write(prompts, batch_size=19)) == texts
    assert [running for running, _ in read] == [0]
    read.clear()
    batch_size = 8
    assert list(write(prompts[:9], batch_size=8)) == texts[:9]
    assert read[-1] == (7, [8]), "the last one waits for no more slots than it needs"


def test_texts_say_why_they_end():
    model, tokenizer = tiny(), ByteTokenizer()
    options = {"max_tokens": 12, "sampling": SAMPLING, "batch_size": 2}
    whole = [continuation.text for continuation in continue_texts(model, tokenizer, PROMPTS[:2], **options)]
    stop = whole[0][3:5]
    assert stop not in whole[1]
    first, second = continue_texts(model, tokenizer, PROMPTS[:2], stop=[stop], **options)
    assert (first.text, first.finish) == (whole[0][: whole[0].index(stop)], "stop")
    assert second.text == whole[1]
    # A special token as a stop string ends a text, too; here it is the first generated token.
    tokenizer.special_tokens["<first>"] = tokenizer.encode(whole[0])[0]
    first, _ = continue_texts(model, tokenizer, PROMPTS[:2], stop=["<first>"], **options)
    assert (first.text, first.finish, first.tokens) == ("", "end", 0)


def test_a_prompt_with_its_begin_token_gets_no_second_one():
    model, tokenizer = tiny(), ByteTokenizer()
    write = functools.partial(stream_text, model, tokenizer, max_tokens=12, sampling=SAMPLING)
    spelled = "".join(write("<bos>x", special_tokens=True))
    assert spelled == "".join(write("x"))
    assert spelled != "".join(write("<bos>x"))


def test_prompts_must_be_texts(as_users_call):
    prompts: Any = ["a"]
    with pytest.raises(TypeError, match="a prompt must be a text, found list; continue_texts takes a list"):
        next(stream_text(tiny(), ByteTokenizer(), prompts, max_tokens=1))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("batch_size", -1, "positive"),
        ("batch_size", 0, "positive"),
        ("max_prompt_tokens", 0, "positive"),
        ("max_tokens", -1, "not be negative"),
        ("max_tokens", 2.0, "a whole number"),
    ],
)
def test_numbers_out_of_their_range_write_nothing(as_users_call, name, value, rule):
    with pytest.raises(ValueError, match=f"{name}={value} must .*{rule}"):
        list(continue_texts(tiny(), ByteTokenizer(), ["a"], **{"max_tokens": 1, name: value}))


def test_counts_may_be_numbers_of_numpy(as_users_call):
    write: Any = functools.partial(continue_texts, tiny(), ByteTokenizer(), ["a", "bcdef"])
    counts = {"max_tokens": np.int64(5), "batch_size": np.int64(1), "max_prompt_tokens": np.int32(3)}
    assert list(write(**counts)) == list(write(**{name: int(count) for name, count in counts.items()}))


def test_sampling_must_have_its_class(as_users_call):
    sampling: Any = {"temperature": 1.0}
    with pytest.raises(TypeError, match=r"sampling must be a memjax\.SamplingConfig, found dict"):
        next(stream_text(tiny(), ByteTokenizer(), "a", max_tokens=1, sampling=sampling))


def test_ids_must_be_integers(as_users_call):
    fractions: Any = [1.0, 1.5]
    with pytest.raises(ValueError, match="the ids of prompt 0 must be whole numbers, not of type float64"):
        check(Request(prompt_ids=fractions, max_tokens=1), 259)


def test_a_text_may_be_longer_than_32_bits_count():
    model, tokenizer = tiny(), ByteTokenizer()
    (whole,) = continue_texts(model, tokenizer, ["a"], max_tokens=60)
    end = whole.text[-12:]
    assert whole.text.index(end) > 20
    (stopped,) = continue_texts(model, tokenizer, ["a"], max_tokens=2**40, stop=[end])
    assert (stopped.text, stopped.finish) == (whole.text[: whole.text.index(end)], "stop")


def test_a_text_alone_is_one_prompt_and_one_stop_string():
    model, tokenizer = tiny(), ByteTokenizer()
    write = functools.partial(continue_texts, model, tokenizer, max_tokens=12, sampling=SAMPLING)
    ((text, *_),) = [list(write([PROMPTS[0]]))]
    stop = text.text[3:5]
    (alone,), (of_iterator,) = write(PROMPTS[0], stop=stop), write(iter(PROMPTS[:1]), stop=[stop])
    assert alone == of_iterator
    assert alone.text == text.text[: text.text.index(stop)]
