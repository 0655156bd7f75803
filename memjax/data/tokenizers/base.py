"""Text to token ids and back: the base of all tokenizers, bytes, and byte-level BPE of the run's own corpus."""

import codecs
import functools
import hashlib
import json
import pathlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from memjax.errors import DataError
from memjax.io.files import read_text, write_atomic

FILE_NAME = "tokenizer.json"
_SPECIAL_TOKENS = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
_MAX_VOCAB_SIZE = 1 << 22
"""Several times that of the largest vocabularies in use."""
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError, MemoryError)
"""What reading content of the wrong shape can raise."""
_MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + 256


class Tokenizer(ABC):
    """Encodes texts; special tokens have ids and names, but no text encodes to them unless that is asked for."""

    kind: ClassVar[str]
    adds_leading_space: bool = False
    """Whether a text's first token carries a space that is no part of the text."""
    added_words: tuple[str, ...] = ()
    """Words that were added to the vocabulary after its training; texts encode to them."""
    adds_bos: bool = True
    """Whether prompts begin with the begin token. Training always puts it in front of records."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens besides `eos_id` at which generation ends."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int] = _SPECIAL_TOKENS,
        *,
        bos_id: int = _SPECIAL_TOKENS["<bos>"],
        eos_id: int = _SPECIAL_TOKENS["<eos>"],
    ):
        """Takes the bytes that each id stands for (none for special tokens), and the special tokens by their names."""
        self._token_bytes = tuple(token_bytes)
        self.special_tokens = dict(special_tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        # Padding is masked everywhere, so any token will do.
        self.pad_id = self.special_tokens.get("<pad>", eos_id)

    def configure(self, *, adds_bos: bool = True, end_tokens: Sequence[str] = ()) -> "Tokenizer":
        """Sets how a model uses the tokenizer, which its file does not hold, and returns the tokenizer.

        Raises:
            ValueError: an end token is no special token.
        """
        if unknown := [name for name in end_tokens if name not in self.special_tokens]:
            raise ValueError(
                f"data.tokenizer.end_tokens: {unknown[0]!r} is none of its special tokens: {_some(self.special_tokens)}"
            )
        self.adds_bos = adds_bos
        self.end_tokens = tuple(name for name in end_tokens if self.special_tokens[name] != self.eos_id)
        return self

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self._token_bytes)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which generation ends; `eos_id` comes first."""
        return (self.eos_id, *(self.special_tokens[name] for name in self.end_tokens))

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that differ between tokenizers that encode differently."""
        return hashlib.sha256(json.dumps(self.to_state(), sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """The ids of a prompt as the model expects them: after the begin token, where prompts have one.

        A begin token that a chat template wrote out is not repeated, and an empty prompt always is the begin token.
        """
        begins = not ids or (self.adds_bos and ids[0] != self.bos_id)
        return [self.bos_id, *ids] if begins else list(ids)

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of the text that the ids of an encoded text stand for; less than the text's own where some is lost."""
        total = sum(len(self.token_bytes(token)) for token in ids)
        first = next((piece for token in ids if (piece := self.token_bytes(token))), b"")
        return total - (self.adds_leading_space and first.startswith(b" "))

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
        """All that encoding depends on as JSON values; `save` and checkpoints keep `full_state`."""

    def full_state(self) -> dict[str, Any]:
        """All of the tokenizer as JSON values, for checkpoints."""
        used = {} if self.adds_bos else {"adds_bos": False}
        return {**self.to_state(), **used, **({"end_tokens": list(self.end_tokens)} if self.end_tokens else {})}

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for the special ones and for ids past the vocabulary."""
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""

    def encode_with_special(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens, such as a chat template's, mean these tokens."""
        if not self.special_tokens:
            return self.encode(text)
        ids: list[int] = []
        for piece in filter(None, self._special_names.split(text)):
            ids += [self.special_tokens[piece]] if piece in self.special_tokens else self.encode(piece)
        return ids

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        # Of names that begin alike the longest counts.
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; those past the vocabulary have no text.
            special: write special tokens by their names, in place of leaving them out.
        """
        decoder = StreamingDecoder(self, special=special)
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json into the folder, which is made if need be."""
        write_atomic(
            pathlib.Path(folder) / FILE_NAME, json.dumps(self.full_state(), ensure_ascii=False, indent=1) + "\n"
        )

    @staticmethod
    def load(folder: str | pathlib.Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or is not a tokenizer.
        """
        path = pathlib.Path(folder) / FILE_NAME
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
        """The tokenizer that `full_state` described.

        Raises:
            ValueError: the state is of no known kind.
            DataError: the package that the kind needs is missing.
        """
        found = Tokenizer._of_kind(state)
        return found.configure(adds_bos=state.get("adds_bos", True), end_tokens=state.get("end_tokens", ()))

    @staticmethod
    def _of_kind(state: dict[str, Any]) -> "Tokenizer":
        kind = state.get("kind")
        if kind == ByteTokenizer.kind:
            return ByteTokenizer()
        if kind == BpeTokenizer.kind and "bpe" in state:
            return BpeTokenizer(state["bpe"])
        # Imported here, because these modules are built on this one.
        try:
            if kind == "hf":
                from memjax.data.tokenizers.hf import HfTokenizer

                return HfTokenizer(state["json"], bos=state["bos"], eos=state["eos"])
            if kind == "sentencepiece":
                from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer

                added = state.get("added_tokens", ())
                return SentencePieceTokenizer(state["model"], bos=state["bos"], eos=state["eos"], added_tokens=added)
            if kind == "tiktoken":
                from memjax.data.tokenizers.tiktoken import TiktokenTokenizer

                ranks, names = state["ranks"], state["special_tokens"]
                return TiktokenTokenizer(
                    ranks, pattern=state["pattern"], special_tokens=names, bos=state["bos"], eos=state["eos"]
                )
        except KeyError as error:
            raise ValueError(f"the state of a tokenizer of kind={kind!r} lacks {error}") from error
        raise ValueError(f"tokenizer kind={kind!r} is unknown; known: byte, bpe, hf, sentencepiece, tiktoken")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_state, (self.full_state(),)


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
        super().__init__(bytes_by_id(self._tokenizer.get_vocab(), dict.fromkeys(_SPECIAL_TOKENS.values(), b"")))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._tokenizer.encode(whole_unicode(text)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([whole_unicode(t) for t in texts])]

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


def begin_and_end(special_tokens: Mapping[str, int], bos: str | None, eos: str | None) -> tuple[int, int]:
    """The ids of the begin and the end token: the named ones, or those of names that are in common use.

    A tokenizer without a begin token of its own, like GPT-2's, begins texts with the end token.

    Raises:
        ValueError: there is no such special token, or none that is known to end texts.
    """
    for field, name in (("bos", bos), ("eos", eos)):
        if name is not None and name not in special_tokens:
            raise ValueError(f"data.tokenizer.{field}={name} is none of its special tokens: {_some(special_tokens)}")
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


class StreamingDecoder:
    """Text of ids that arrive one at a time; a character appears once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = (), special: bool = False):
        """Decodes what follows the ids `after`; special tokens are left out, or written by their names."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._shows_special = special
        # A text begins after a special token too: what is encoded there got a space of its own.
        self._at_start = not after or after[-1] in self._names

    def push(self, token: int) -> str:
        """The text that this id completes; often a word, sometimes nothing."""
        if token in self._names:
            self._at_start = True
            return self.finish() + self._names[token] if self._shows_special else ""
        piece = self._tokenizer.token_bytes(token)
        if piece and self._at_start and self._tokenizer.adds_leading_space:
            piece = piece.removeprefix(b" ")
        self._at_start = self._at_start and not self._tokenizer.token_bytes(token)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is still held back, unfinished characters as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def byte_letters() -> list[str]:
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


def bytes_by_id(vocab: Mapping[str, int], known: Mapping[int, bytes]) -> list[bytes]:
    """The bytes of every id of a byte-level vocabulary.

    Args:
        vocab: ids by words, which are spelled in `byte_letters`.
        known: the bytes of words that are spelled otherwise, by id.

    Raises:
        ValueError: two words share an id, an id is far beyond the number of words, or a word has other letters.
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
                "word under added_tokens if texts may hold it, or take it out of the vocabulary"
            ) from None
    return found


def check_id(token: int) -> None:
    """Refuses ids for which no table of tokens should be allocated.

    Raises:
        ValueError: the id is negative, or larger than any vocabulary in use.
    """
    if not 0 <= token < _MAX_VOCAB_SIZE:
        raise ValueError(f"has the token id {token}; ids must be in 0..{_MAX_VOCAB_SIZE - 1}")


def explained(error: BaseException) -> str:
    """An error of malformed content in one line: messages of this package as they are, others with their kind."""
    text = " ".join(str(error).split())[:500]
    return text if type(error) is ValueError else f"malformed tokenizer ({type(error).__name__}: {text[:200]})"


def whole_unicode(text: str) -> str:
    """The text itself; the library would raise a TypeError that does not name the cause."""
    if not text.isascii():
        text.encode()
    return text
