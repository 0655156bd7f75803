"""Small tokenizers in other libraries' formats, written by those libraries."""

import base64
import io
import json

import pytest
import sentencepiece
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.processors
import tokenizers.trainers

CORPUS = ["the cat sat on the mat", "naïve café, naïve café", "日本語の日本語", "def f(x):\n\treturn x  # x"] * 4


def hf_json() -> dict:
    """Like Llama 3's: special tokens after the vocabulary, one added word, and a post-processor that prepends BOS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(names)
    tokenizer.add_tokens([tokenizers.AddedToken("catamaran", normalized=False)])
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    tokenizer.enable_truncation(4)
    return json.loads(tokenizer.to_str())


def sentencepiece_model() -> bytes:
    """Like Llama 2's: no normalisation, byte fallback for unknown characters, and a space before texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]"],
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def tiktoken_ranks() -> bytes:
    """All bytes in reverse order, and a few longer tokens."""
    tokens = [bytes([byte]) for byte in reversed(range(256))]
    tokens += [b"th", b" c", b"the", b"at", b" cat", "é".encode(), "日".encode(), b"  "]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory):
    """A folder with hf.json, sentencepiece.model and ranks.tiktoken."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "hf.json").write_text(json.dumps(hf_json()))
    (folder / "sentencepiece.model").write_bytes(sentencepiece_model())
    (folder / "ranks.tiktoken").write_bytes(tiktoken_ranks())
    return folder
