"""Text of ids that arrive one at a time."""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memjax.data.tokenizers.base import Tokenizer


class StreamingDecoder:
    """Text of ids that arrive one at a time; a character appears once all its bytes are there."""

    def __init__(self, tokenizer: "Tokenizer", *, after: Sequence[int] = (), special: bool = False):
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
        if piece and self._at_start:
            self._at_start = False
            piece = piece.removeprefix(b" ") if self._tokenizer.adds_leading_space else piece
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is still held back, unfinished characters as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
