"""Tokenizers in and out of Hugging Face folders, checked against the libraries that define the files."""

import base64
import io
import json

import pytest
import sentencepiece
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from memjax.data.tokenizers.base import ByteTokenizer, Tokenizer
from memjax.data.tokenizers.bpe import train_bpe
from memjax.data.tokenizers.hf import HfTokenizer
from memjax.data.tokenizers.tiktoken import TiktokenTokenizer
from memjax.errors import ConfigError, DataError
from memjax.interop.huggingface.tokenizer import read_tokenizer
from memjax.interop.huggingface.written_tokenizer import write_tokenizer

TEXTS = ["the cat sat on the mat", "naïve  日本 x\n\n", "<eos> is a text", ""]
SPECIAL = ["<|begin|>", "<|stop|>", "<|pad|>"]


@pytest.fixture(scope="module")
def byte_level() -> dict:
    """A tokenizer.json whose special tokens have unknown names."""
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
def test_begin_and_end_tokens_come_from_the_folder(settings, config, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    opened, tokenizer = read_tokenizer(tmp_path, None, config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (opened.kind, opened.path) == ("hf", str(tmp_path / "tokenizer.json"))
    library = tokenizers.Tokenizer.from_str(json.dumps(byte_level))
    assert tokenizer.encode("the cat") == library.encode("the cat").ids


def test_of_two_tokenizers_the_readable_one_is_used(pieces, tmp_path):
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
    # The inputs of a decoder's `generate`; by default, transformers 4 adds token types, which `generate` refuses.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    # Batches of prompts are continued at their last position.
    assert settings["padding_side"] == "left"
    again = read_tokenizer(folder, None, {})[1]
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    if kind == "sentencepiece":
        assert (folder / "tokenizer.model").read_bytes() == pieces
        return
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS[:2]:
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    if kind != "hf":  # the decoder of "hf" is kept as it is
        assert [library.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    name = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.eos_id)
    assert library.encode(f"the{name}").ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize("adds", [True, False])
def test_a_space_before_texts_is_added_by_transformers_4_too(adds, byte_level, tmp_path):
    """transformers 4 overrides the file's pre-tokenizer by tokenizer_config.json, or else by its own default."""
    before = {**byte_level["pre_tokenizer"], "add_prefix_space": adds}
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level | {"pre_tokenizer": before}))
    tokenizer = read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})[1]
    assert (tokenizer.encode("cat") == tokenizer.encode(" cat")) == adds
    write_tokenizer(tmp_path, tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is adds


def test_a_kind_without_an_equivalent_is_not_written(tmp_path):
    ranks = b"".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n".encode() for byte in range(256))
    tokenizer = TiktokenTokenizer.of_file(ranks, pattern="gpt2", special_tokens=("<|endoftext|>",))
    assert not write_tokenizer(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []


def _chatml(folder, pieces: bytes, *, in_json: bool) -> int:
    """Writes the folder of a SentencePiece model with two added tokens; returns the first new id."""
    library = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    size = library.GetPieceSize()
    added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if in_json:
        tokens = [{"id": token, "content": name, "special": True} for name, token in added.items()]
        vocab = [[library.IdToPiece(token), 0.0] for token in range(size)]
        content = {"added_tokens": tokens, "model": {"type": "Unigram", "vocab": vocab}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return size


@pytest.mark.parametrize("in_json", [True, False])
def test_tokens_that_were_added_to_a_sentencepiece_model_and_end_texts_are_known(in_json, pieces, tmp_path):
    size = _chatml(tmp_path, pieces, in_json=in_json)
    settings, tokenizer = read_tokenizer(tmp_path, None, {"eos_token_id": size + 1})
    assert settings.added_tokens == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode_with_special("<|im_start|>the")[0] == size
    assert tokenizer.end_ids == (tokenizer.special_tokens["</s>"], size + 1)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    again = read_tokenizer(tmp_path / "out", None, {"eos_token_id": [2, size + 1]})[1]
    assert (again.special_tokens, again.end_ids) == (tokenizer.special_tokens, tokenizer.end_ids)


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({"added_tokens.json": {"<x>": 900}}, {}, "adds tokens with the ids \\[900\\]"),
        ({"added_tokens.json": {"<x>": 5}}, {}, "its piece 5 is .*, the folder's other files call that token '<x>'"),
        ({}, {"eos_token_id": 900}, "eos_token_id=900 is beyond the 280 tokens of the tokenizer"),
        ({}, {"eos_token_id": "2"}, "eos_token_id='2' must be the id of a token, a list of ids or null"),
        ({"generation_config.json": {"eos_token_id": [2, True]}}, {}, "eos_token_id=True must be the id of a token"),
        ({"generation_config.json": {"bos_token_id": 1.0}}, {}, "bos_token_id=1.0 must be the id of a token"),
        ({"generation_config.json": {"eos_token_id": [2, 900]}}, {}, "eos_token_id=900 is beyond"),
        (
            {
                "tokenizer_config.json": {"added_tokens_decoder": {"280": {"content": "<y>"}}},
                "added_tokens.json": {"<x>": 280},
            },
            {},
            "gives the added token '<x>' the id 280, another file of the folder says otherwise",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"280": 5}}},
            {},
            "an entry of its added tokens is malformed",
        ),
    ],
)
def test_files_that_contradict_the_tokenizer_are_refused(files, config, message, pieces, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path, None, config)


def test_a_token_that_only_a_second_file_adds_to_a_byte_level_bpe_is_refused(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|begin|>": 0, "<|im_end|>": 281}))
    with pytest.raises(
        DataError, match=r"lacks the token '<\|im_end\|>' with the id 281, which the files next to it add"
    ):
        read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})


def _template(name: str, token: int) -> dict:
    one = {"SpecialToken": {"id": name, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {name: {"id": name, "ids": [token], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": [one, text], "pair": [one, text], "special_tokens": tokens}


@pytest.mark.parametrize(
    ("processor", "settings", "adds"),
    [
        (None, {}, False),
        (_template("<|begin|>", 0), {}, True),
        (_template("<|begin|>", 0), {"add_bos_token": False}, False),
        (None, {"add_bos_token": True}, True),
        (_template("<|begin|>", 0), {"add_bos_token": "False"}, False),
        (None, {"add_bos_token": "true", "tokenizer_class": "LlamaTokenizerFast"}, True),
        (_template("<|begin|>", 0), {"add_bos_token": 0}, False),
        (None, {"add_bos_token": 1}, True),
        (_template("<|begin|>", 0), {"add_bos_token": None}, True),
        # transformers 4 and 5 read the flag only for some classes.
        (_template("<|begin|>", 0), {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}, True),
        (None, {"add_bos_token": True, "tokenizer_class": "Qwen2Tokenizer"}, False),
    ],
)
def test_the_begin_token_of_prompts_survives_both_ways(processor, settings, adds, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_level, "post_processor": processor}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    opened, tokenizer = read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})
    assert (opened.adds_bos, tokenizer.adds_bos) == (adds, adds)
    ids = tokenizer.encode("the cat")
    assert tokenizer.prompt(ids) == [0] * adds + ids
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode("the cat").ids == tokenizer.prompt(ids)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is adds


@pytest.mark.parametrize(
    ("settings", "adds"), [({}, True), ({"add_bos_token": None}, False), ({"add_bos_token": 0}, False)]
)
def test_a_sentencepiece_model_alone_defines_the_flag(settings, adds, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(_model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(tmp_path, None, {})[1].adds_bos is adds


def test_flags_that_contradict_the_post_processor_or_are_dropped_are_reported(byte_level, tmp_path, capsys):
    settings = {"add_bos_token": "false", "add_eos_token": "TRUE"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_level, "post_processor": _template("<|begin|>", 0)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})
    told = capsys.readouterr().err
    assert "add_bos_token=false in tokenizer_config.json, but the post-processor" in told
    assert "add_eos_token is not kept: prompts do not end with the end token" in told


@pytest.mark.parametrize("value", ["no", 2, [], {}])
def test_invalid_flags_are_refused(value, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": value}))
    with pytest.raises(DataError, match=r"add_bos_token=.* must be true, false or null"):
        read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})


def test_prompts_that_begin_with_another_token_are_refused(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_level, "post_processor": _template("<|pad|>", 2)}))
    with pytest.raises(DataError, match=r"begins prompts with the tokens \[2\]"):
        read_tokenizer(tmp_path, None, {"bos_token_id": 0, "eos_token_id": 1})


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_exported_tokenizers_begin_texts_as_in_training(kind, tmp_path):
    tokenizer = ByteTokenizer() if kind == "byte" else train_bpe(["the cat sat on the mat"] * 9, 270)
    write_tokenizer(tmp_path, tokenizer)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:2]:
        assert library.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert read_tokenizer(tmp_path, None, {})[1].adds_bos


def test_exported_tokenizers_have_their_own_pad_token_or_leave_it_to_the_user(byte_level, tmp_path):
    for name, tokenizer in (
        ("own", ByteTokenizer()),
        ("none", HfTokenizer(byte_level, bos="<|begin|>", eos="<|stop|>")),
    ):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, tokenizer)
    own, none = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("own", "none"))
    assert own["pad_token"] == "<pad>"
    assert "pad_token" not in none


def _model(**settings) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on the mat", "a mat and a cat"] * 4),
        model_writer=written,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **{
            "vocab_size": 290,
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **settings,
        },
    )
    return written.getvalue()


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False}, {"control_symbols": ["[INST]"]}])
def test_a_sentencepiece_bpe_is_written_as_a_tokenizer_json_with_the_same_ids(settings, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(_model(**settings))
    tokenizer = read_tokenizer(tmp_path, None, {})[1]
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in (*TEXTS[:2], " the", "  the  mat", "\n the", "日本", "the\n\n\tcat "):
        assert library.encode(text).ids == tokenizer.prompt(tokenizer.encode(text))
        assert library.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    again = read_tokenizer(tmp_path / "out", None, {})[1]
    assert (again.kind, again.special_tokens, again.adds_bos) == ("sentencepiece", tokenizer.special_tokens, True)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "vocab_size": 274},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=["unigram", "normalised", "spaces"],
)
def test_a_sentencepiece_model_that_encodes_otherwise_is_written_as_its_own_file_only(settings, tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(_model(**settings))
    tokenizer = read_tokenizer(tmp_path, None, {})[1]
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert "transformers 5 converts tokenizer.model itself" in capsys.readouterr().err
