"""Text to token ids and back: the base class of all tokenizers, and the byte tokenizer."""

import functools
import hashlib
import importlib
import json
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, SupportsIndex

from memjax.data.tokenizers.decoding import StreamingDecoder
from memjax.errors import DataError
from memjax.io.files import read_text, write_atomic
from memjax.io.paths import local_path

FILE_NAME = "tokenizer.json"
SPECIAL_TOKENS = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
_MAX_VOCAB_SIZE = 1 << 22
"""Several times the largest vocabulary in use."""
_CLASSES = {
    "byte": "base.ByteTokenizer",
    "bpe": "bpe.BpeTokenizer",
    "hf": "hf.HfTokenizer",
    "sentencepiece": "sentencepiece.SentencePieceTokenizer",
    "tiktoken": "tiktoken.TiktokenTokenizer",
}
"""Module and class of each kind."""
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError, MemoryError)
"""Errors that malformed content can cause."""


class Tokenizer(ABC):
    """Encodes texts; special tokens have ids and names, but texts encode to them only on request."""

    kind: ClassVar[str]
    STATE: ClassVar[tuple[str, ...]] = ()
    """The fields of `to_state` that are arguments of the constructor."""
    adds_leading_space: bool = False
    """Whether a text's first token carries a space that is not part of the text."""
    added_words: tuple[str, ...] = ()
    """Words added to the vocabulary after its training; texts encode to them."""
    adds_bos: bool = True
    """Whether prompts begin with the BOS token. Training always puts it in front of records."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens besides `eos_id` at which generation ends."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int] = SPECIAL_TOKENS,
        *,
        bos_id: int = SPECIAL_TOKENS["<bos>"],
        eos_id: int = SPECIAL_TOKENS["<eos>"],
    ):
        """Takes the bytes of each id (none for special tokens), and the ids of special tokens by name."""
        self._token_bytes = tuple(token_bytes)
        self.special_tokens = dict(special_tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        # Padding is masked everywhere, so any token will do.
        self.pad_id = self.special_tokens.get("<pad>", eos_id)

    def configure(self, *, adds_bos: bool = True, end_tokens: Sequence[str] = ()) -> "Tokenizer":
        """Sets how a model uses the tokenizer, which the tokenizer's file does not say, and returns the tokenizer.

        Raises:
            ValueError: an end token is not a special token.
        """
        if unknown := [name for name in end_tokens if name not in self.special_tokens]:
            raise ValueError(
                f"data.tokenizer.end_tokens: {unknown[0]!r} is not one of its special tokens: "
                f"{_some(self.special_tokens)}"
            )
        self.adds_bos = adds_bos
        self.end_tokens = tuple(name for name in end_tokens if self.special_tokens[name] != self.eos_id)
        return self

    @property
    def vocab_size(self) -> int:
        """Number of ids, including special tokens."""
        return len(self._token_bytes)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which generation ends; `eos_id` comes first."""
        return (self.eos_id, *(self.special_tokens[name] for name in self.end_tokens))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ if tokenizers encode differently."""
        return hashlib.sha256(json.dumps(self.to_state(), sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Adds the BOS token to the ids of a prompt if the model expects it.

        A BOS token already written by a chat template is not repeated; an empty prompt always becomes the BOS token.
        """
        begins = not ids or (self.adds_bos and ids[0] != self.bos_id)
        return [self.bos_id, *ids] if begins else list(ids)

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Length in bytes of the text that ids decode to; less than the original text's if encoding loses some."""
        total = sum(len(self.token_bytes(token)) for token in ids)
        first = next((piece for token in ids if (piece := self.token_bytes(token))), b"")
        return total - (self.adds_leading_space and first.startswith(b" "))

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which UTF-8 cannot represent.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes several texts; BPE uses all cores."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """Everything that encoding depends on, as JSON values; `save` and checkpoints store `full_state`."""

    def full_state(self) -> dict[str, Any]:
        """The complete tokenizer as JSON values, for checkpoints."""
        used = {} if self.adds_bos else {"adds_bos": False}
        return {**self.to_state(), **used, **({"end_tokens": list(self.end_tokens)} if self.end_tokens else {})}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none for special tokens and ids outside the vocabulary."""
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""

    def encode_with_special(self, text: str) -> list[int]:
        """Encodes a text in which names of special tokens, such as a chat template's, stand for these tokens."""
        if not self.special_tokens:
            return self.encode(text)
        ids: list[int] = []
        for piece in filter(None, self._special_names.split(text)):
            ids += [self.special_tokens[piece]] if piece in self.special_tokens else self.encode(piece)
        return ids

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        # The longest of names with a common prefix must match first.
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; those outside the vocabulary have no text.
            special: write the names of special tokens instead of omitting them.
        """
        decoder = StreamingDecoder(self, special=special)
        # Elements of a JAX array are arrays, which cannot be looked up in a dict.
        return "".join([decoder.push(operator.index(token)) for token in ids]) + decoder.finish()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json into the folder, which is created if necessary."""
        path = local_path(folder, "folder", DataError) / FILE_NAME
        write_atomic(path, json.dumps(self.full_state(), ensure_ascii=False, indent=1) + "\n")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Tokenizer":
        """Loads a tokenizer written by `save`.

        Raises:
            DataError: the file is missing or is not a tokenizer.
        """
        path = local_path(folder, "folder", DataError) / FILE_NAME
        try:
            state = json.loads(read_text(path))
        except FileNotFoundError:
            raise DataError(f"{path}: there is no tokenizer here; name the folder of a run") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); copy it again from the run it belongs to") from error
        try:
            return Tokenizer.from_state(state if isinstance(state, dict) else {})
        except MALFORMED as error:
            raise DataError(f"{path}: {explained(error)}") from error

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Tokenizer":
        """Restores a tokenizer from its `full_state`.

        Raises:
            ValueError: the kind is unknown, or the state is malformed.
            DataError: a package needed for the kind is missing.
        """
        kind = state.get("kind")
        if not isinstance(kind, str) or kind not in _CLASSES:
            raise ValueError(f"tokenizer kind={kind!r} is unknown; known: {', '.join(_CLASSES)}")
        # Imported here because these modules import this one.
        module, name = _CLASSES[kind].split(".")
        tokenizer = getattr(importlib.import_module(f"memjax.data.tokenizers.{module}"), name)
        # Added tokens are stored only if there are any.
        fields = {"added_tokens": (), **state}
        try:
            arguments = {field: fields[field] for field in tokenizer.STATE}
        except KeyError as error:
            raise ValueError(f"the state of a tokenizer of kind={kind!r} lacks {error}") from error
        found = tokenizer(**arguments)
        return found.configure(adds_bos=state.get("adds_bos", True), end_tokens=state.get("end_tokens", ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_state, (self.full_state(),)


class ByteTokenizer(Tokenizer):
    """Encodes byte b of the UTF-8 text as id b + 3."""

    kind: ClassVar[str] = "byte"

    def __init__(self) -> None:
        super().__init__([b""] * len(SPECIAL_TOKENS) + [bytes([b]) for b in range(256)])

    def encode(self, text: str) -> list[int]:
        return [byte + len(SPECIAL_TOKENS) for byte in text.encode()]

    def to_state(self) -> dict[str, Any]:
        return {"kind": self.kind}


def begin_and_end(special_tokens: Mapping[str, int], bos: str | None, eos: str | None) -> tuple[int, int]:
    """The ids of the BOS and EOS tokens: the named ones, or those with a common name.

    If there is no BOS token, as in GPT-2, EOS serves as one.

    Raises:
        ValueError: a named token is not a special token, or no EOS token is found.
    """
    for field, name in (("bos", bos), ("eos", eos)):
        if name is not None and name not in special_tokens:
            raise ValueError(f"data.tokenizer.{field}={name} is not one of its special tokens: {_some(special_tokens)}")
    known = lambda names: next((name for name in names if name in special_tokens), None)
    end = eos or known(("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"))
    if end is None:
        raise ValueError(
            f"none of its special tokens is known to end texts; set data.tokenizer.eos to one of: "
            f"{_some(special_tokens)}"
        )
    begin = bos or known(("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>")) or end
    return special_tokens[begin], special_tokens[end]


def _some(special_tokens: Mapping[str, int]) -> str:
    names = list(special_tokens)
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "it has none"


def check_id(token: int) -> None:
    """Raises ValueError for an id that is negative or beyond any vocabulary in use: a table is allocated up to it."""
    if not 0 <= token < _MAX_VOCAB_SIZE:
        raise ValueError(f"has the token id {token}; ids must be in 0..{_MAX_VOCAB_SIZE - 1}")


def explained(error: BaseException) -> str:
    """An error about malformed content in one line: ValueErrors verbatim, others with their type."""
    text = " ".join(str(error).split())[:500]
    return text if type(error) is ValueError else f"malformed tokenizer ({type(error).__name__}: {text[:200]})"


def whole_unicode(text: str) -> str:
    """Returns the text if it is valid Unicode; the library would raise a TypeError that hides the cause."""
    if not text.isascii():
        text.encode()
    return text
