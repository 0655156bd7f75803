"""Tokenizers from files in the formats of other libraries."""

import json
import pathlib

from memjax.config import TokenizerConfig
from memjax.data.hf_tokenizer import HfTokenizer
from memjax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from memjax.data.tiktoken_tokenizer import TiktokenTokenizer
from memjax.data.tokenizer import ByteTokenizer, Tokenizer
from memjax.errors import DataError


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a config whose kind needs no training.

    Raises:
        DataError: its file is not named, missing or no tokenizer, or its package is missing.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    if config.path is None:
        raise DataError(f"data.tokenizer.path is not set; data.tokenizer.kind={config.kind} needs its file")
    path = pathlib.Path(config.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); set data.tokenizer.path to a file") from error
    try:
        if config.kind == "hf":
            return HfTokenizer(json.loads(content), bos=config.bos, eos=config.eos)
        if config.kind == "sentencepiece":
            return SentencePieceTokenizer.of_file(content, bos=config.bos, eos=config.eos)
        return TiktokenTokenizer.of_file(
            content, pattern=config.pattern, special_tokens=config.special_tokens, bos=config.bos, eos=config.eos
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
