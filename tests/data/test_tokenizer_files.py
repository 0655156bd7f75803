"""What is said when a tokenizer file or its package is missing or wrong; each kind has tests of its own."""

import sys

import pytest

from memjax.config import TokenizerConfig
from memjax.data.tokenizer_files import open_tokenizer
from memjax.errors import DataError

FILES = {"sentencepiece": "sentencepiece.model", "tiktoken": "ranks.tiktoken"}


def test_what_a_file_cannot_give_is_said(tokenizer_files, tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer\.path is not set; data\.tokenizer\.kind=hf needs its file"):
        open_tokenizer(TokenizerConfig(kind="hf"))
    with pytest.raises(DataError, match="none: cannot be read"):
        open_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"hf\.json: .*eos=<end> is none of its special tokens"):
        open_tokenizer(TokenizerConfig(kind="hf", path=str(tokenizer_files / "hf.json"), eos="<end>"))
    with pytest.raises(ValueError, match="path=x is for a tokenizer from a file"):
        TokenizerConfig(kind="bpe", path="x")
    with pytest.raises(ValueError, match="must name each token once"):
        TokenizerConfig(kind="tiktoken", special_tokens=("<a>", "<a>"))


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_missing_package_names_the_extra(kind, tokenizer_files, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(DataError, match=rf"needs the package {kind}: pip install 'memjax\[tokenizers\]'"):
        open_tokenizer(TokenizerConfig(kind=kind, path=str(tokenizer_files / FILES[kind])))
