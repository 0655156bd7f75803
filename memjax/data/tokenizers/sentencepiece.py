"""Tokenizers from a SentencePiece .model file: Llama 1 and 2, Mistral, T5 and similar models."""

import base64
from collections.abc import Sequence
from typing import Any, ClassVar

from memjax.data.tokenizers.base import Tokenizer, begin_and_end, whole_unicode
from memjax.errors import DataError

SPACE = "\u2581"
"""Represents a space in pieces; the library treats it as a space in texts too."""


class SentencePieceTokenizer(Tokenizer):
    """Encodes like the library; texts round-trip as far as the model's normalisation leaves them unchanged.

    Models with a piece for each byte cover every text; others decode unknown characters as U+FFFD.
    """

    kind: ClassVar[str] = "sentencepiece"
    STATE = ("model", "bos", "eos", "added_tokens")

    def __init__(self, model: str, bos: str | None = None, eos: str | None = None, added_tokens: Sequence[str] = ()):
        """`model` is the content of the file in base64. `bos` and `eos` name tokens to use instead of the model's own;
        added_tokens get the ids after the last piece.

        Raises:
            ValueError: it is not a SentencePiece model, or has no such token.
            DataError: the library is missing.
        """
        self._model, self._bos, self._eos = model, bos, eos
        try:
            content = base64.b64decode(model)
        except ValueError as error:
            raise ValueError(f"not a SentencePiece model ({error})") from error
        processor = self._processor = _processor(content)
        pieces = self.pieces = _pieces(processor)
        """The model's pieces by id, without added tokens."""
        self.unknown = pieces[processor.unk_id()]
        """The piece that stands for unknown characters."""
        special_tokens = _special_tokens(processor, pieces, added_tokens)
        if known := sorted(set(added_tokens) & set(pieces)):
            raise ValueError(f"its added token {known[0]!r} is a piece of the model already")
        self._added_tokens = tuple(added_tokens)

        def own(token: int) -> str | None:
            return pieces[token] if token >= 0 else None

        bos_id, eos_id = begin_and_end(special_tokens, bos or own(processor.bos_id()), eos or own(processor.eos_id()))
        super().__init__(
            [self._bytes_of(token, piece) for token, piece in enumerate(pieces)] + [b""] * len(added_tokens),
            special_tokens,
            bos_id=bos_id,
            eos_id=eos_id,
        )
        self.adds_leading_space = b"".join(map(self.token_bytes, self.encode("a"))).startswith(b" ")

    @classmethod
    def of_file(
        cls, content: bytes, *, bos: str | None = None, eos: str | None = None, added_tokens: Sequence[str] = ()
    ) -> "SentencePieceTokenizer":
        """The tokenizer of a .model file's content; raises like the constructor."""
        return cls(base64.b64encode(content).decode(), bos=bos, eos=eos, added_tokens=added_tokens)

    @staticmethod
    def pieces_of(content: bytes) -> list[str]:
        """The pieces of a .model file, by id; raises like the constructor."""
        return _pieces(_processor(content))

    @staticmethod
    def special_tokens_of(content: bytes, added_tokens: Sequence[str] = ()) -> dict[str, int]:
        """The special tokens of a .model file and its added tokens; raises like the constructor."""
        processor = _processor(content)
        return _special_tokens(processor, _pieces(processor), added_tokens)

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(whole_unicode(text))

    def to_state(self) -> dict[str, Any]:
        state = {"kind": self.kind, "model": self._model, "bos": self._bos, "eos": self._eos}
        return {**state, "added_tokens": list(self._added_tokens)} if self._added_tokens else state

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if self._processor.IsControl(token) or self._processor.IsUnused(token):
            return b""
        if self._processor.IsUnknown(token):
            return "\ufffd".encode()
        if self._processor.IsByte(token):  # <0x0A>
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode()


def _pieces(processor: Any) -> list[str]:
    return [processor.IdToPiece(token) for token in range(processor.GetPieceSize())]


def _special_tokens(processor: Any, pieces: Sequence[str], added_tokens: Sequence[str]) -> dict[str, int]:
    """The model's control pieces, and added tokens with the ids after the last piece."""
    own = {piece: token for token, piece in enumerate(pieces) if processor.IsControl(token)}
    return own | {name: len(pieces) + number for number, name in enumerate(added_tokens)}


def _processor(content: bytes) -> Any:
    """The library's processor for a .model file's content."""
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "a tokenizer of kind=sentencepiece needs the package sentencepiece: pip install sentencepiece"
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"not a SentencePiece model ({error})") from error
    return processor
