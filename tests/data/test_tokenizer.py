import functools
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data.records import DataError
from memjax.data.tokenizer import BpeTokenizer, ByteTokenizer, StreamingDecoder, Tokenizer, train_bpe

CORPUS = ["the cat sat on the mat", "naïve café, naïve café", "日本語の日本語", "def f(x):\n\treturn x  # x"] * 4
PIECES = ["<eos>", "<pad>", " ", "\n", "é", "日本", "\U0001f469\u200d\U0001f467", "the", "\x00"]
TRICKY = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else train_bpe(CORPUS, 300)


kinds = pytest.mark.parametrize("kind", ["byte", "bpe"])


@kinds
@given(text=TRICKY)
def test_every_text_comes_back_and_needs_no_special_token(kind, text):
    ids = tokenizer(kind).encode(text)
    assert tokenizer(kind).decode(ids) == text
    assert all(3 <= i < tokenizer(kind).vocab_size for i in ids)


@kinds
@given(texts=st.lists(TRICKY, max_size=4))
def test_a_batch_is_its_texts_one_by_one(kind, texts):
    assert tokenizer(kind).encode_batch(texts) == [tokenizer(kind).encode(text) for text in texts]


@kinds
@given(text=TRICKY)
def test_streamed_text_is_the_decoded_text_and_shows_no_broken_characters(kind, text):
    decoder = StreamingDecoder(tokenizer(kind))
    pieces = [decoder.push(i) for i in [1, *tokenizer(kind).encode(text), 2]]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_streaming_holds_a_character_back_until_its_last_byte():
    decoder = StreamingDecoder(ByteTokenizer())
    assert [decoder.push(byte + 3) for byte in "é!".encode()] == ["", "é", "!"]
    assert decoder.push(0xC3 + 3) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a") + 3) == "a"


@kinds
def test_decoding_replaces_bad_bytes_and_skips_special_and_unknown_ids(kind):
    euro = tokenizer(kind).encode("a€")
    first_bytes = ByteTokenizer().encode("a€")[:2] if kind == "byte" else None
    assert tokenizer(kind).decode([1, *euro, 2, 0, 10**6, -1]) == "a€"
    if first_bytes:
        assert tokenizer(kind).decode(first_bytes) == "a\ufffd"


def test_byte_ids_are_the_bytes_shifted_by_the_special_tokens():
    assert ByteTokenizer().encode("A\x00ÿ") == [68, 3, 0xC3 + 3, 0xBF + 3]
    assert ByteTokenizer().vocab_size == 259


@kinds
def test_state_file_and_pickle_give_the_same_tokenizer(kind, tmp_path):
    original = tokenizer(kind)
    original.save(tmp_path / "new")
    state = json.loads(json.dumps(original.to_state()))
    for copy in (Tokenizer.from_state(state), Tokenizer.load(tmp_path / "new"), pickle.loads(pickle.dumps(original))):
        assert type(copy) is type(original)
        assert copy.fingerprint == original.fingerprint
        assert copy.vocab_size == original.vocab_size
        assert copy.encode("the naïve 日本") == original.encode("the naïve 日本")


def test_training_is_repeatable_and_keeps_to_its_size():
    first, second, other = (train_bpe(CORPUS[:n], 290) for n in (16, 16, 1))
    assert first.to_state() == second.to_state()
    assert first.fingerprint != other.fingerprint != ByteTokenizer().fingerprint
    assert first.vocab_size <= 290
    assert train_bpe([], 259).vocab_size == 259
    assert len(tokenizer("bpe").encode("the cat")) < 7
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        train_bpe(CORPUS, 258)


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="there is no tokenizer here"):
        Tokenizer.load(tmp_path)
    for text, message in (("{", "not JSON"), ('{"kind": "words"}', "kind='words' is unknown"), ("[]", "kind=None")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        BpeTokenizer({"model": 3})


@kinds
def test_half_a_surrogate_pair_is_refused(kind):
    with pytest.raises(UnicodeEncodeError):
        tokenizer(kind).encode("a\ud800")
