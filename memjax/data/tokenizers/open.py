"""Opens tokenizers from files in other libraries' formats."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import MALFORMED, ByteTokenizer, Tokenizer, explained
from memjax.data.tokenizers.hf import HfTokenizer
from memjax.data.tokenizers.round_trip import lost_in
from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from memjax.data.tokenizers.tiktoken import TiktokenTokenizer
from memjax.errors import DataError
from memjax.io.console import say
from memjax.io.files import read_document


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a config whose kind needs no training; prints a warning if it loses text.

    Raises:
        DataError: its file is not set, missing or not a tokenizer, or its package is missing.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    with _reading(config) as content:
        tokenizer = _of_content(content, config).configure(adds_bos=config.adds_bos, end_tokens=config.end_tokens)
        lost = lost_in(tokenizer)
    if lost:
        say(
            f"warning: {config.path}: texts do not come back exactly from its tokens, so a model can neither read nor "
            f"write: {'; '.join(lost)}"
        )
    return tokenizer


def special_tokens_of(config: TokenizerConfig) -> dict[str, int]:
    """The special tokens of a tokenizer file, even if none of them is known to end texts.

    Raises:
        DataError: as `open_tokenizer`.
    """
    with _reading(config) as content:
        if config.kind == "hf":
            return HfTokenizer.special_tokens_of(json.loads(content))
        return SentencePieceTokenizer.special_tokens_of(content, config.added_tokens)


def sentencepiece_pieces(path: pathlib.Path) -> list[str]:
    """The pieces of a SentencePiece .model, by id; DataError as in `open_tokenizer`."""
    with _reading(TokenizerConfig(kind="sentencepiece", path=str(path))) as content:
        return SentencePieceTokenizer.pieces_of(content)


@contextlib.contextmanager
def _reading(config: TokenizerConfig) -> Iterator[bytes]:
    """The content of a config's file; errors about it in the block become a DataError that names the file."""
    if config.path is None:
        raise DataError(f"data.tokenizer.path is not set; data.tokenizer.kind={config.kind} needs its file")
    path = pathlib.Path(config.path)
    try:
        content = read_document(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); set data.tokenizer.path to a file") from error
    try:
        yield content
    except MALFORMED as error:
        raise DataError(f"{path}: {explained(error)}") from error


def _of_content(content: bytes, config: TokenizerConfig) -> Tokenizer:
    names = {"bos": config.bos, "eos": config.eos}
    if config.kind == "hf":
        return HfTokenizer(json.loads(content), **names)
    if config.kind == "sentencepiece":
        return SentencePieceTokenizer.of_file(content, added_tokens=config.added_tokens, **names)
    return TiktokenTokenizer.of_file(content, pattern=config.pattern, special_tokens=config.special_tokens, **names)
