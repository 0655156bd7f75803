import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer, begin_and_end
from memjax.data.tokenizers.bpe import train_bpe
from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.data.tokenizers.open import open_tokenizer
from memjax.errors import DataError

CORPUS = ["the cat sat on the mat", "naïve café, naïve café", "日本語の日本語", "def f(x):\n\treturn x  # x"] * 4
PIECES = ["<eos>", "<pad>", " ", "\n", "é", "日本", "\U0001f469\u200d\U0001f467", "the", "\x00"]
# SentencePiece uses U+2581 for a space.
TRICKY = st.text(st.characters(exclude_characters="\u2581", codec="utf-8")) | st.lists(st.sampled_from(PIECES)).map(
    "".join
)


FILES = {"hf": "hf.json", "sentencepiece": "sentencepiece.model", "tiktoken": "ranks.tiktoken"}
KINDS = ["byte", "bpe", *FILES]


@pytest.fixture(scope="session")
def opened(tokenizer_files) -> dict[str, Tokenizer]:
    """One tokenizer of every kind."""
    of_files = {
        kind: open_tokenizer(TokenizerConfig(kind=kind, path=str(tokenizer_files / name)))  # pyright: ignore[reportArgumentType]
        for kind, name in FILES.items()
    }
    return {"byte": ByteTokenizer(), "bpe": train_bpe(CORPUS, 300), **of_files}


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@given(text=TRICKY)
def test_every_text_comes_back_and_needs_no_special_token(opened, kind, text):
    chosen = opened[kind]
    text += "".join(chosen.special_tokens)
    ids = chosen.encode(text)
    assert chosen.decode(ids) == text
    assert set(ids) <= set(range(chosen.vocab_size)) - set(chosen.special_tokens.values())


@kinds
@given(data=st.data())
def test_special_tokens_are_read_and_written_on_request(opened, kind, data):
    chosen = opened[kind]
    pieces = data.draw(st.lists(st.sampled_from([*chosen.special_tokens, "the cat", " ", "é", "<"])))
    text = "".join(pieces)
    ids = chosen.encode_with_special(text)
    assert chosen.decode(ids, special=True) == text
    special = [chosen.special_tokens[piece] for piece in pieces if piece in chosen.special_tokens]
    assert [i for i in ids if i in chosen.special_tokens.values()] == special


@kinds
@given(texts=st.lists(TRICKY, max_size=4))
def test_a_batch_is_its_texts_one_by_one(opened, kind, texts):
    assert opened[kind].encode_batch(texts) == [opened[kind].encode(text) for text in texts]


@kinds
@given(text=TRICKY)
def test_streamed_text_is_the_decoded_text_and_shows_no_broken_characters(opened, kind, text):
    chosen = opened[kind]
    decoder = StreamingDecoder(chosen)
    pieces = [decoder.push(i) for i in [chosen.bos_id, *chosen.encode(text), chosen.eos_id]]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


@kinds
def test_decoding_replaces_bad_bytes_and_skips_special_and_unknown_ids(opened, kind):
    chosen = opened[kind]
    euro = chosen.encode("a€")
    assert chosen.decode([chosen.bos_id, *euro, chosen.eos_id, chosen.pad_id, 10**6, -1]) == "a€"
    assert chosen.decode(euro[:-1]) == "a\ufffd"
    for array in (np.asarray, jnp.asarray):  # such as tokens sampled from a model
        assert chosen.decode(array(euro)) == "a€"


@kinds
def test_what_follows_a_prompt_keeps_its_spaces(opened, kind):
    chosen = opened[kind]
    prompt, whole = chosen.encode("the cat"), chosen.encode("the cat sat  on")
    assert whole[: len(prompt)] == prompt
    decoder = StreamingDecoder(chosen, after=[chosen.bos_id, *prompt])
    assert "".join(decoder.push(i) for i in whole[len(prompt) :]) == " sat  on"
    fresh = StreamingDecoder(chosen, after=[chosen.bos_id])
    assert "".join(fresh.push(i) for i in whole) == "the cat sat  on"


def test_byte_ids_are_the_bytes_shifted_by_the_special_tokens():
    assert ByteTokenizer().encode("A\x00ÿ") == [68, 3, 0xC3 + 3, 0xBF + 3]
    assert ByteTokenizer().vocab_size == 259


@kinds
def test_state_file_and_pickle_give_the_same_tokenizer(opened, kind, tmp_path):
    original = opened[kind]
    original.save(tmp_path / "new")
    state = json.loads(json.dumps(original.to_state()))
    for copy in (Tokenizer.from_state(state), Tokenizer.load(tmp_path / "new"), pickle.loads(pickle.dumps(original))):
        assert type(copy) is type(original)
        assert copy.fingerprint == original.fingerprint
        assert copy.vocab_size == original.vocab_size
        assert copy.encode("the naïve 日本") == original.encode("the naïve 日本")
        for name in ("pad_id", "bos_id", "eos_id", "special_tokens", "adds_leading_space"):
            assert getattr(copy, name) == getattr(original, name)


def test_fingerprints_differ(opened):
    assert len({chosen.fingerprint for chosen in opened.values()}) == len(KINDS)


def test_begin_and_end_are_found_by_common_names_or_given():
    llama = {"<|begin_of_text|>": 7, "<|end_of_text|>": 8, "<|eot_id|>": 9}
    assert begin_and_end(llama, None, None) == (7, 8)
    assert begin_and_end(llama, None, "<|eot_id|>") == (7, 9)
    assert begin_and_end({"<|endoftext|>": 5}, None, None) == (5, 5)
    with pytest.raises(ValueError, match=r"bos=<s> is not one of its special tokens: <\|begin_of_text\|>, <\|end"):
        begin_and_end(llama, "<s>", None)
    with pytest.raises(ValueError, match=r"set data\.tokenizer\.eos to one of: \[SEP\]"):
        begin_and_end({"[SEP]": 1}, None, None)


def test_anything_but_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="there is no tokenizer here"):
        Tokenizer.load(tmp_path)
    for text, message in (("{", "not JSON"), ('{"kind": "words"}', "kind='words' is unknown"), ("[]", "kind=None")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="kind='hf' lacks 'json'"):
        Tokenizer.from_state({"kind": "hf"})


@kinds
def test_half_a_surrogate_pair_is_refused(opened, kind):
    with pytest.raises(UnicodeEncodeError):
        opened[kind].encode("a\ud800")
