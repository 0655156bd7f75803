"""Byte-level BPE from a tokenizer.json of the Hugging Face tokenizers library: GPT-2, Llama 3 and their kin."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tokenizers

from memjax.data.tokenizer import Tokenizer, begin_and_end, byte_letters, whole_unicode


class HfTokenizer(Tokenizer):
    """Encodes as the library does, without the special tokens that its post-processor would add."""

    kind: ClassVar[str] = "hf"

    def __init__(self, description: Any, *, bos: str | None = None, eos: str | None = None):
        """Takes the content of a tokenizer.json, and the names of the begin and the end token where they are not known.

        Raises:
            ValueError: it is no byte-level BPE, or has no such token.
        """
        if not isinstance(description, dict) or "ByteLevel" not in _types(description):
            raise ValueError(
                "not a tokenizer.json with a byte-level BPE (GPT-2, Llama 3 and later); of a model with SentencePiece "
                "take its .model file and kind=sentencepiece"
            )
        # Whoever saved it may have left a length in it, to which texts would be cut.
        self._description = {**description, "truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizers library cannot read it ({error})") from error
        # A text that spells a special token is a text.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        vocab = self._tokenizer.get_vocab()
        if missing := [letter for letter in byte_of if letter not in vocab]:
            raise ValueError(f"its BPE lacks {len(missing)} of the 256 bytes; texts would lose them")
        token_bytes = [b""] * (max(vocab.values()) + 1)
        for token, index in vocab.items():
            if index in added:
                token_bytes[index] = b"" if added[index].special else token.encode()
            else:
                token_bytes[index] = bytes(byte_of[letter] for letter in token)
        special_tokens = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._bos, self._eos = bos, eos
        bos_id, eos_id = begin_and_end(special_tokens, bos, eos)
        super().__init__(token_bytes, special_tokens, bos_id=bos_id, eos_id=eos_id)
        for name in special_tokens:
            if not set(special_tokens.values()).isdisjoint(self.encode(name)):
                raise ValueError(f"texts that spell its special token {name} would encode to it")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._tokenizer.encode(whole_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the cores."""
        texts = [whole_unicode(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def to_state(self) -> dict[str, Any]:
        """The whole tokenizer.json."""
        return {"kind": self.kind, "json": self._description, "bos": self._bos, "eos": self._eos}


def _types(part: Any) -> set[str]:
    """The types of a tokenizer's parts, those in sequences too, where its model is a BPE."""

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for inner in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
                yield from walk(inner)

    if not isinstance(part.get("model"), dict) or part["model"].get("type") != "BPE":
        return set()
    return {*walk(part.get("pre_tokenizer")), *walk(part.get("decoder"))}
