"""Opening a tokenizer file reports what its round trip loses; the texts themselves are the oracle."""

import io
import json

import pytest
import sentencepiece

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.data.tokenizers.hf import HfTokenizer
from memjax.data.tokenizers.open import open_tokenizer
from memjax.data.tokenizers.round_trip import lost_in
from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from memjax.errors import DataError


@pytest.fixture(scope="module")
def description(tokenizer_files) -> dict:
    return json.loads((tokenizer_files / "hf.json").read_text())


def sentencepiece_model(**settings) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on the mat", "a b c The again , ."] * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return written.getvalue()


def test_tokenizers_that_give_every_text_back_lose_nothing(description, tokenizer_files):
    assert lost_in(ByteTokenizer()) == []
    assert lost_in(HfTokenizer(description)) == ["spaces around 'catamaran'"] or lost_in(HfTokenizer(description)) == []
    llama = SentencePieceTokenizer.of_file((tokenizer_files / "sentencepiece.model").read_bytes())
    assert lost_in(llama) == ["the character ▁"]


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        ({"type": "Lowercase"}, "upper case"),
        ({"type": "NFKC"}, "compatibility characters"),
        ({"type": "NFC"}, "combining accents"),
        ({"type": "Replace", "pattern": {"String": "\n"}, "content": " "}, "line breaks"),
        ({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}, "runs of spaces"),
        ({"type": "Strip", "strip_left": True, "strip_right": True}, "spaces at the end"),
        ({"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": False}, "tabs"),
    ],
)
def test_what_a_normalizer_drops_is_named(normalizer, lost, description):
    found = lost_in(HfTokenizer({**description, "normalizer": normalizer}))
    assert any(name.startswith(lost) for name in found), found


def test_what_sentencepiece_drops_by_default_is_named():
    found = lost_in(SentencePieceTokenizer.of_file(sentencepiece_model()))
    assert {"line breaks", "tabs", "runs of spaces"} < set(found)
    suffixed = sentencepiece_model(treat_whitespace_as_suffix=True, remove_extra_whitespaces=False)
    assert lost_in(SentencePieceTokenizer.of_file(suffixed))[0].startswith("a space is added at the end")


def test_bytes_that_a_tokenizer_drops_are_not_counted(description):
    text = "the cat\n\n  sat "
    lossy = SentencePieceTokenizer.of_file(sentencepiece_model())
    for tokenizer in (ByteTokenizer(), HfTokenizer(description), lossy):
        ids = tokenizer.encode(text)
        assert tokenizer.num_bytes(ids) == len(tokenizer.decode(ids).encode())
    assert lossy.num_bytes(lossy.encode(text)) == len("the cat sat")


def test_what_is_lost_is_printed_once_and_what_is_unusable_refused(description, tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    config = TokenizerConfig(kind="hf", path=str(path))
    path.write_text(json.dumps({**description, "normalizer": {"type": "Lowercase"}}))
    open_tokenizer(config)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "tokenizer.json: texts do not come back exactly from its tokens" in out
    assert "upper case" in out
    byte_level = description["pre_tokenizer"]
    removed = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    for change in (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [removed, byte_level]}},
        {"model": {**description["model"], "merges": [], "end_of_word_suffix": "</w>", "unk_token": "!"}},
    ):
        path.write_text(json.dumps({**description, **change}))
        with pytest.raises(DataError, match=r"tokenizer\.json: (texts do not come back|the tokenizers library)"):
            open_tokenizer(config)
