"""Errors for missing or invalid tokenizer files and packages; each kind of tokenizer has its own tests."""

import json
import pickle
import sys
import time

import pytest

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.open import open_tokenizer
from memjax.errors import DataError

FILES = {"sentencepiece": "sentencepiece.model", "tiktoken": "ranks.tiktoken"}


def test_what_a_file_lacks_is_reported(tokenizer_files, tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer\.path is not set; data\.tokenizer\.kind=hf needs its file"):
        open_tokenizer(TokenizerConfig(kind="hf"))
    with pytest.raises(DataError, match="none: cannot be read"):
        open_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"hf\.json: .*eos=<end> is not one of its special tokens"):
        open_tokenizer(TokenizerConfig(kind="hf", path=str(tokenizer_files / "hf.json"), eos="<end>"))
    with pytest.raises(ValueError, match="path=x is for a tokenizer from a file"):
        TokenizerConfig(kind="bpe", path="x")
    with pytest.raises(ValueError, match="must name each token once"):
        TokenizerConfig(kind="tiktoken", special_tokens=("<a>", "<a>"))


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named_with_how_to_install_it(kind, tokenizer_files, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(DataError, match=f"needs the package {kind}: pip install {kind}"):
        open_tokenizer(TokenizerConfig(kind=kind, path=str(tokenizer_files / FILES[kind])))


def _long_list(depth: int) -> str:
    return '{"model": {"type": "BPE", "vocab": ' + "[" * depth + "]" * depth + '}, "decoder": {"type": "ByteLevel"}}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        _long_list(500),
        _long_list(100_000),
        "[]",
        "null",
        "3",
        '{"model": null}',
        '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": null}}',
        '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}',
        '{"model": {"type": "BPE", "vocab": [1]}, "decoder": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": 5, "decoder": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE", "vocab": {"a": 1e400}}, "decoder": {"type": "ByteLevel"}}',
        "\ufeff\udce9".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    ],
    ids=range(14),
)
def test_invalid_content_is_reported_in_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        open_tokenizer(TokenizerConfig(kind="hf", path=str(path)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_an_invalid_saved_tokenizer_is_reported_in_one_line(tmp_path):
    states = ('{"kind": "hf", "json": 3, "bos": null, "eos": null}', '{"kind": "bpe", "bpe": {}}', "[" * 100_000)
    for state in (*states, '{"kind": "tiktoken", "ranks": [], "pattern": 1, "special_tokens": 2, "bos": 0, "eos": 0}'):
        (tmp_path / "tokenizer.json").write_text(state)
        with pytest.raises(DataError) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_hundred_thousand_special_tokens_take_seconds(tokenizer_files, tmp_path):
    description = json.loads((tokenizer_files / "hf.json").read_text())
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = 1 + max(token["id"] for token in description["added_tokens"])
    many = [{"id": first + number, "content": f"<|special_{number}|>", **flags} for number in range(100_000)]
    description["added_tokens"] += many
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    before = time.process_time()
    tokenizer = open_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / "tokenizer.json")))
    assert time.process_time() - before < 30  # takes about 3 s; encoding the names one by one took minutes
    assert tokenizer.encode_with_special("a<|special_99999|>")[-1] == many[-1]["id"]


def test_how_a_model_uses_a_tokenizer_is_kept_but_encodes_nothing_else(tokenizer_files, tmp_path):
    path = str(tokenizer_files / "hf.json")
    plain = open_tokenizer(TokenizerConfig(kind="hf", path=path))
    used = open_tokenizer(TokenizerConfig(kind="hf", path=path, adds_bos=False, end_tokens=("<|eot_id|>",)))
    used.save(tmp_path)
    for tokenizer in (used, Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(used))):
        assert tokenizer.end_ids == (plain.eos_id, plain.special_tokens["<|eot_id|>"])
        assert tokenizer.prompt([9]) == [9]
        assert tokenizer.prompt([]) == [plain.bos_id]
        assert tokenizer.fingerprint == plain.fingerprint
    assert plain.prompt([9]) == plain.prompt([plain.bos_id, 9]) == [plain.bos_id, 9]
    assert plain.end_ids == (plain.eos_id,)
    with pytest.raises(DataError, match=r"end_tokens: 'the' is not one of its special tokens"):
        open_tokenizer(TokenizerConfig(kind="hf", path=path, end_tokens=("the",)))
