"""Byte-level BPE from a tiktoken rank file: each line holds a token's bytes in base64 and its rank, which is its id."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from memjax.data.tokenizers.base import Tokenizer, begin_and_end, check_id, whole_unicode
from memjax.errors import DataError

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?|"
        rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
}
"""Regular expressions that split texts, by vocabulary: the part of its definition that the rank file lacks."""


class TiktokenTokenizer(Tokenizer):
    """Encodes like the library; special tokens get the ids after the last rank."""

    kind: ClassVar[str] = "tiktoken"
    STATE = ("ranks", "pattern", "special_tokens", "bos", "eos")

    def __init__(
        self,
        ranks: Mapping[str, int],
        pattern: str,
        special_tokens: Sequence[str],
        bos: str | None = None,
        eos: str | None = None,
    ):
        """Takes ranks by token in base64, the regular expression that splits texts, and the names of special tokens.

        Raises:
            ValueError: a byte is not a token, two tokens share a rank, or `bos` or `eos` is not a special token.
            DataError: the library is missing.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise DataError("a tokenizer of kind=tiktoken needs the package tiktoken: pip install tiktoken") from error
        self._ranks, self._pattern, self._bos, self._eos = dict(ranks), pattern, bos, eos
        of_bytes = {base64.b64decode(token): rank for token, rank in ranks.items()}
        if missing := [byte for byte in range(256) if bytes([byte]) not in of_bytes]:
            raise ValueError(f"{len(missing)} of the 256 bytes are not tokens; texts would lose them")
        if len(of_bytes) < len(ranks) or len(set(of_bytes.values())) < len(ranks):
            raise ValueError("two tokens have the same rank, or two ranks the same token")
        for rank in (min(of_bytes.values()), max(of_bytes.values())):
            check_id(rank)
        first = max(of_bytes.values()) + 1
        ids = {name: first + number for number, name in enumerate(special_tokens)}
        token_bytes = [b""] * (first + len(ids))
        for token, rank in of_bytes.items():
            token_bytes[rank] = token
        bos_id, eos_id = begin_and_end(ids, bos, eos)
        super().__init__(token_bytes, ids, bos_id=bos_id, eos_id=eos_id)
        self._encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=of_bytes, special_tokens=ids)

    @classmethod
    def of_file(
        cls,
        content: bytes,
        *,
        pattern: str,
        special_tokens: Sequence[str],
        bos: str | None = None,
        eos: str | None = None,
    ) -> "TiktokenTokenizer":
        """The tokenizer of a file's content, with one of `PATTERNS` by name.

        Raises:
            ValueError: a line is not a token with its rank, or the constructor raises it.
            DataError: the library is missing.
        """
        ranks = {}
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                # Whisper's multilingual vocabulary ends with an empty token, written as padding alone.
                if token != b"=":
                    base64.b64decode(token, validate=True)
                if token.decode() in ranks:
                    raise ValueError
                ranks[token.decode()] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"line {number} is not a token in base 64 and its rank, or repeats a token") from None
        return cls(ranks, pattern=PATTERNS[pattern], special_tokens=special_tokens, bos=bos, eos=eos)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(whole_unicode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch([whole_unicode(text) for text in texts])

    def to_state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "ranks": self._ranks,
            "pattern": self._pattern,
            "special_tokens": list(self.special_tokens),
            "bos": self._bos,
            "eos": self._eos,
        }
