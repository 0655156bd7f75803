"""Text to token ids and back, exactly: bytes, or byte-level BPE trained on the run's own corpus."""

import codecs
import hashlib
import json
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from memjax.data.records import DataError

FILE_NAME = "tokenizer.json"
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + 256


class Tokenizer(ABC):
    """Ids 0, 1 and 2 are padding, begin and end of a record; no text encodes to them."""

    kind: ClassVar[str]
    pad_id: ClassVar[int] = 0
    bos_id: ClassVar[int] = 1
    eos_id: ClassVar[int] = 2

    def __init__(self, token_bytes: Sequence[bytes]):
        self._token_bytes = tuple(token_bytes)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self._token_bytes)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ between tokenizers that encode differently."""
        return hashlib.sha256(json.dumps(self.to_state(), sort_keys=True).encode()).hexdigest()[:16]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which no UTF-8 can carry.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; BPE spreads them over the cores."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """All of the tokenizer as JSON values, for checkpoints."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; empty for the special ones and for ids past the vocabulary."""
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json into the folder, which is made if need be."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_state(), ensure_ascii=False, indent=1)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | pathlib.Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or is not a tokenizer.
        """
        path = pathlib.Path(folder) / FILE_NAME
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: there is no tokenizer here; name the folder of a run") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); copy it again from the run it belongs to") from error
        try:
            return Tokenizer.from_state(state if isinstance(state, dict) else {})
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_state` described.

        Raises:
            ValueError: the state is of no known kind.
        """
        kind = state.get("kind")
        if kind == ByteTokenizer.kind:
            return ByteTokenizer()
        if kind == BpeTokenizer.kind and "bpe" in state:
            return BpeTokenizer(state["bpe"])
        raise ValueError(f"tokenizer kind={kind!r} is unknown; known: {ByteTokenizer.kind}, {BpeTokenizer.kind}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_state, (self.to_state(),)


class ByteTokenizer(Tokenizer):
    """Byte b of the UTF-8 text is id b + 3."""

    kind: ClassVar[str] = "byte"

    def __init__(self) -> None:
        super().__init__([b""] * len(_SPECIAL_TOKENS) + [bytes([b]) for b in range(256)])

    def encode(self, text: str) -> list[int]:
        """One id for each byte of the UTF-8 text."""
        return [byte + len(_SPECIAL_TOKENS) for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def to_state(self) -> dict[str, Any]:
        """There is nothing to keep but the kind."""
        return {"kind": self.kind}


class BpeTokenizer(Tokenizer):
    """Byte-level BPE; made by `train_bpe` or from a state."""

    kind: ClassVar[str] = "bpe"

    def __init__(self, bpe: dict[str, Any]):
        """Takes the `bpe` part of a state: the description that the tokenizers library writes."""
        self._bpe = bpe
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bpe))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the BPE's description cannot be read ({error})") from error
        vocab = self._tokenizer.get_vocab()
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        token_bytes = [b""] * len(vocab)
        for token, index in vocab.items():
            if index >= len(_SPECIAL_TOKENS):
                token_bytes[index] = bytes(byte_of[letter] for letter in token)
        super().__init__(token_bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._tokenizer.encode(_whole_unicode(text)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([_whole_unicode(t) for t in texts])]

    def to_state(self) -> dict[str, Any]:
        """Vocabulary and merges, as the tokenizers library describes them."""
        return {"kind": self.kind, "bpe": self._bpe}


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens; the same texts always give the same one.

    All 256 bytes are tokens, so texts unlike the training text round-trip too.

    Raises:
        ValueError: vocab_size has no room for the bytes and the special tokens.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {_MIN_VOCAB_SIZE}: 256 bytes and 3 special tokens")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())
    # The library looks for added tokens inside texts; without them a text that spells "<eos>" stays a text.
    # Merges cannot spell one either: the pre-tokenizer parts brackets from letters.
    bpe["added_tokens"] = []
    return BpeTokenizer(bpe)


class StreamingDecoder:
    """Text of ids that arrive one at a time; a character appears once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes; often a word, sometimes nothing."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is still held back, unfinished characters as U+FFFD; the decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _byte_letters() -> list[str]:
    """For each byte the letter that stands for it in byte-level BPE vocabularies.

    Visible Latin-1 characters stand for themselves, the other bytes for the letters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    num_hidden = 0
    for byte in range(256):
        letters.append(chr(byte if byte in visible else 0x100 + num_hidden))
        num_hidden += byte not in visible
    return letters


def _whole_unicode(text: str) -> str:
    """The text itself; the library would raise a TypeError that does not name the cause."""
    if not text.isascii():
        text.encode()
    return text
