"""Byte-level BPE trained on the run's own corpus, and helpers for all byte-level vocabularies."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from memjax.data.tokenizers.base import SPECIAL_TOKENS, Tokenizer, check_id, whole_unicode

_MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


class LibraryTokenizer(Tokenizer):
    """Encodes with the tokenizers library, without the special tokens that a post-processor would add."""

    _tokenizer: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(whole_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [whole_unicode(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class BpeTokenizer(LibraryTokenizer):
    """Byte-level BPE, created by `train_bpe` or from a state."""

    kind: ClassVar[str] = "bpe"
    STATE = ("bpe",)

    def __init__(self, bpe: dict[str, Any]):
        """Takes the `bpe` field of a state: the tokenizers library's own JSON description."""
        self._bpe = bpe
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bpe))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the BPE's description cannot be read ({error})") from error
        super().__init__(bytes_by_id(self._tokenizer.get_vocab(), dict.fromkeys(SPECIAL_TOKENS.values(), b"")))

    def to_state(self) -> dict[str, Any]:
        return {"kind": self.kind, "bpe": self._bpe}


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most vocab_size tokens, deterministically.

    All 256 bytes are tokens, so any text round-trips.

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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())
    # The library searches texts for added tokens; without them, a text that spells "<eos>" is encoded as text.
    # Merges cannot produce one either: the pre-tokenizer separates brackets from letters.
    bpe["added_tokens"] = []
    return BpeTokenizer(bpe)


def byte_letters() -> list[str]:
    """The letter that represents each byte in byte-level BPE vocabularies.

    Visible Latin-1 characters represent themselves; the other bytes are mapped, in order, to the letters from U+0100.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    num_hidden = 0
    for byte in range(256):
        letters.append(chr(byte if byte in visible else 0x100 + num_hidden))
        num_hidden += byte not in visible
    return letters


def bytes_by_id(vocab: Mapping[str, int], known: Mapping[int, bytes]) -> list[bytes]:
    """The bytes of every id of a byte-level vocabulary. Words are spelled in `byte_letters`, except those whose bytes
    `known` gives by id.

    Raises:
        ValueError: two words share an id, an id is out of range, or a word has other letters.
    """
    if len(set(vocab.values())) < len(vocab):
        seen: dict[int, str] = {}
        twice = next((seen[index], word) for word, index in vocab.items() if seen.setdefault(index, word) != word)
        raise ValueError(f"its words {twice[0]!r} and {twice[1]!r} have the same id")
    check_id(max(vocab.values(), default=0))
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    found = [b""] * (max(vocab.values(), default=-1) + 1)
    for word, index in vocab.items():
        try:
            found[index] = known[index] if index in known else bytes([byte_of[letter] for letter in word])
        except KeyError as error:
            raise ValueError(
                f"its word {word!r} has the letter {error}, which stands for no byte in a byte-level BPE; list the "
                "word under added_tokens if texts may hold it, or remove it from the vocabulary"
            ) from None
    return found
