"""A .model file means what the SentencePiece library makes of it."""

import base64
import io

import pytest
import sentencepiece

from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer


@pytest.fixture(scope="module")
def model(tokenizer_files) -> bytes:
    return (tokenizer_files / "sentencepiece.model").read_bytes()


def test_ids_and_texts_are_the_librarys(model):
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(model)
    tokenizer = SentencePieceTokenizer.of_file(model)
    assert tokenizer.vocab_size == library.GetPieceSize()
    assert tokenizer.adds_leading_space
    for text in ("the cat sat", " two  spaces ", "naïve 日本 \U0001f469", "<s> is a text"):
        assert tokenizer.encode(text) == library.EncodeAsIds(text)
        assert tokenizer.decode(tokenizer.encode(text)) == library.DecodeIds(library.EncodeAsIds(text)) == text


def test_special_tokens_are_the_models_control_symbols(model):
    tokenizer = SentencePieceTokenizer.of_file(model)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "[INST]": 3}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert SentencePieceTokenizer.of_file(model, eos="[INST]").eos_id == 3


def test_bytes_of_a_character_are_put_together(model):
    tokenizer = SentencePieceTokenizer.of_file(model)
    ids = tokenizer.encode("a€")
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert pieces[-3:] == ["", "", "€"]


def test_a_model_without_bytes_marks_what_it_does_not_know():
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on the mat"] * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=20,
        add_dummy_prefix=False,
        minloglevel=2,
        num_threads=1,
    )
    tokenizer = SentencePieceTokenizer.of_file(written.getvalue())
    assert not tokenizer.adds_leading_space
    assert tokenizer.decode(tokenizer.encode("the § cat")) == "the \ufffd cat"


def test_anything_but_a_model_is_refused():
    for content in (b"", b"no model"):
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            SentencePieceTokenizer(base64.b64encode(content).decode())


def test_added_tokens_follow_the_pieces_and_are_special(model):
    plain = SentencePieceTokenizer.of_file(model)
    chat = SentencePieceTokenizer.of_file(model, added_tokens=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    first = plain.vocab_size
    assert (chat.vocab_size, chat.eos_id) == (first + 2, first + 1)
    assert chat.encode("<|im_end|>") == plain.encode("<|im_end|>")
    assert chat.encode_with_special("<|im_start|>the<|im_end|>") == [first, *plain.encode("the"), first + 1]
    assert Tokenizer.from_state(chat.full_state()).special_tokens == chat.special_tokens
    with pytest.raises(ValueError, match="its added token '</s>' is a piece of the model already"):
        SentencePieceTokenizer.of_file(model, added_tokens=("</s>",))
