"""Byte-level BPE from a tokenizer.json of the Hugging Face tokenizers library: GPT-2, Llama 3 and similar models."""

import functools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import tokenizers

from memjax.data.tokenizers.base import begin_and_end, whole_unicode
from memjax.data.tokenizers.bpe import LibraryTokenizer, byte_letters, bytes_by_id


class HfTokenizer(LibraryTokenizer):
    """A tokenizer.json, without its length limits and dropout."""

    kind: ClassVar[str] = "hf"
    STATE = ("json", "bos", "eos")

    def __init__(self, json: Any, bos: str | None = None, eos: str | None = None):
        """Takes the content of a tokenizer.json, and the names of its BOS and EOS tokens unless they have common names.

        Raises:
            ValueError: it is not a byte-level BPE, or has no such token.
        """
        _check_byte_level(json)
        # Files may hold a maximum length, to which texts would be truncated, or BPE dropout, which is random.
        self._description = description = {**json, "truncation": None, "padding": None}
        if description["model"].get("dropout") is not None:
            description["model"] = {**description["model"], "dropout": None}
        self._tokenizer = read_description(description)
        added = self._tokenizer.get_added_tokens_decoder()
        vocab = self._tokenizer.get_vocab()
        if missing := [letter for letter in byte_letters() if letter not in vocab]:
            raise ValueError(f"its BPE lacks {len(missing)} of the 256 bytes; texts would lose them")
        known = {index: b"" if token.special else token.content.encode() for index, token in added.items()}
        token_bytes = bytes_by_id(vocab, known)
        for token in description.get("added_tokens") or ():
            if token["id"] not in added or added[token["id"]].content != token["content"]:
                raise ValueError(
                    f"its added token {token['content']!r} has the id {token['id']} in the file, which the tokenizers "
                    "library does not give it"
                )
        special_tokens = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._bos, self._eos = bos, eos
        bos_id, eos_id = begin_and_end(special_tokens, bos, eos)
        super().__init__(token_bytes, special_tokens, bos_id=bos_id, eos_id=eos_id)
        self.added_words = tuple(token.content for _, token in sorted(added.items()) if not token.special)
        # A text that spells a special token is encoded as text.
        self._tokenizer.encode_special_tokens = True
        ids_of_special = set(special_tokens.values())
        for name, ids in zip(special_tokens, self.encode_batch(list(special_tokens)), strict=True):
            if not ids_of_special.isdisjoint(ids):
                raise ValueError(f"texts that spell its special token {name} would encode to it")
        self.adds_leading_space = b"".join(map(self.token_bytes, self.encode("a"))) == b" a"

    @staticmethod
    def special_tokens_of(description: Any) -> dict[str, int]:
        """The special tokens of a tokenizer.json; ValueError if it is not a byte-level BPE."""
        _check_byte_level(description)
        added = read_description(description).get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items()) if token.special}

    def encode_with_special(self, text: str) -> list[int]:
        """Encodes a text in which names of special tokens stand for these tokens.

        Tokens with lstrip or rstrip absorb the spaces around them; those with single_word match whole words only.
        """
        return self._with_special.encode(whole_unicode(text), add_special_tokens=False).ids

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return read_description(self._description)

    def to_state(self) -> dict[str, Any]:
        return {"kind": self.kind, "json": self._description, "bos": self._bos, "eos": self._eos}


def _check_byte_level(description: Any) -> None:
    if not isinstance(description, dict) or "ByteLevel" not in _types(description):
        raise ValueError(
            "not a tokenizer.json with a byte-level BPE (GPT-2, Llama 3 and later); for a model with SentencePiece, "
            "use its .model file and kind=sentencepiece"
        )


def read_description(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer for a tokenizer.json, without length limits.

    Raises:
        ValueError: the library cannot read it, or cannot encode with it.
    """
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps({**description, "truncation": None, "padding": None}))
        # Incompatible parts fail only when used.
        found.encode("a")
        return found
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except BaseException as error:
        # The library raises bare Exception, and its PanicException is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the tokenizers library cannot read it ({reason})") from None
        raise


def _types(part: Any) -> set[str]:
    """The types of a tokenizer's parts, including those in sequences; empty unless its model is a BPE.

    Older files, such as GPT-2's, do not name the type of the model; a BPE has merges.
    """

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for inner in (part.get("pretokenizers"), part.get("decoders")):
                for each in inner if isinstance(inner, list) else ():
                    yield from walk(each)

    model = part.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE" if "merges" in model else None) != "BPE":
        return set()
    return {*walk(part.get("pre_tokenizer")), *walk(part.get("decoder"))}
