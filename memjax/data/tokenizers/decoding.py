"""Incremental decoding of token ids."""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memjax.data.tokenizers.base import Tokenizer


class StreamingDecoder:
    """Decodes ids one at a time; a character appears once all its bytes have arrived."""

    def __init__(self, tokenizer: "Tokenizer", *, after: Sequence[int] = (), special: bool = False):
        """Decodes what follows the ids `after`; special tokens are omitted, or written by name if `special`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._shows_special = special
        # Text after a special token was encoded separately, so it has its own leading space.
        self._at_start = not after or after[-1] in self._names

    def push(self, token: int) -> str:
        """Adds an id, and returns the text that it completes: often a word, sometimes nothing."""
        if token in self._names:
            self._at_start = True
            return self.finish() + self._names[token] if self._shows_special else ""
        piece = self._tokenizer.token_bytes(token)
        if piece and self._at_start:
            self._at_start = False
            piece = piece.removeprefix(b" ") if self._tokenizer.adds_leading_space else piece
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """Returns the remaining text; incomplete characters become U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
