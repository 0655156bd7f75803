"""Tokenizers in and out of Hugging Face folders; their own libraries say what the files mean."""

import base64
import io
import json

import pytest
import sentencepiece
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from memjax.data.tiktoken_tokenizer import TiktokenTokenizer
from memjax.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from memjax.errors import ConfigError, DataError
from memjax.interop.hf_tokenizer_files import read_tokenizer, write_tokenizer

TEXTS = ["the cat sat on the mat", "naïve  日本 x\n\n", "<eos> is a text", ""]
SPECIAL = ["<|begin|>", "<|stop|>", "<|pad|>"]


@pytest.fixture(scope="module")
def byte_level() -> dict:
    """A tokenizer.json whose special tokens have names that nobody knows."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    trained.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    return json.loads(trained.to_str())


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece .model."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on the mat"] * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"bos_token": "<|begin|>", "eos_token": {"content": "<|stop|>", "special": True}}, {}),
        ({"bos_token": None, "eos_token": "no special token"}, {"bos_token_id": 0, "eos_token_id": [1, 2]}),
        (None, {"bos_token_id": 0, "eos_token_id": 1}),
    ],
)
def test_the_folder_says_which_tokens_begin_and_end_a_text(settings, config, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    opened, tokenizer = read_tokenizer(tmp_path, None, config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (opened.kind, opened.path) == ("hf", str(tmp_path / "tokenizer.json"))
    library = tokenizers.Tokenizer.from_str(json.dumps(byte_level))
    assert tokenizer.encode("the cat") == library.encode("the cat").ids


def test_of_two_tokenizers_the_one_that_can_be_read_is_taken(pieces, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    opened, tokenizer = read_tokenizer(tmp_path, None, {})
    assert opened.kind == "sentencepiece"
    assert tokenizer.encode("the cat") == sentencepiece.SentencePieceProcessor(model_proto=pieces).EncodeAsIds(
        "the cat"
    )


def test_without_a_tokenizer_the_ways_out_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"neither tokenizer.json nor tokenizer.model; set --tokenizer to .* or to byte"
    ):
        read_tokenizer(tmp_path, None, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"(?s)not a tokenizer.json with a byte-level BPE.*set --tokenizer to"):
        read_tokenizer(tmp_path, None, {})
    with pytest.raises(ConfigError, match=r"tokenizer=vocab.txt must be byte, or a file that ends in .json or .model"):
        read_tokenizer(tmp_path, "vocab.txt", {})
    with pytest.raises(DataError, match=r"gone.json: cannot be read"):
        read_tokenizer(tmp_path, "gone.json", {})
    assert isinstance(read_tokenizer(tmp_path, "byte", {})[1], ByteTokenizer)


@pytest.mark.parametrize("kind", ["byte", "bpe", "hf", "sentencepiece"])
def test_what_is_written_encodes_as_before_and_is_read_again(kind, byte_level, pieces, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(byte_level))
    (tmp_path / "t.model").write_bytes(pieces)
    before: dict[str, Tokenizer] = {
        "byte": ByteTokenizer(),
        "bpe": train_bpe(["the cat sat on the mat"] * 9, 270),
        "hf": read_tokenizer(tmp_path, str(tmp_path / "t.json"), {"bos_token_id": 0, "eos_token_id": 1})[1],
        "sentencepiece": read_tokenizer(tmp_path, str(tmp_path / "t.model"), {})[1],
    }
    folder = tmp_path / "out"
    folder.mkdir()
    tokenizer = before[kind]
    assert write_tokenizer(folder, tokenizer)
    again = read_tokenizer(folder, None, {})[1]
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    if kind == "sentencepiece":
        assert (folder / "tokenizer.model").read_bytes() == pieces
        return
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS[:2]:
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    if kind != "hf":  # whose decoder is its own business
        assert [library.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    name = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.eos_id)
    assert library.encode(f"the{name}").ids[-1] == tokenizer.eos_id


def test_a_kind_that_has_no_form_there_is_not_written(tmp_path):
    ranks = b"".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n".encode() for byte in range(256))
    tokenizer = TiktokenTokenizer.of_file(ranks, pattern="gpt2", special_tokens=("<|endoftext|>",))
    assert not write_tokenizer(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []
