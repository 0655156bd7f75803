"""The JSON files that describe the tokenizer of a Hugging Face folder, checked for contradictions."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from memjax.data.tokenizers.hf import read_description
from memjax.errors import CheckpointError, DataError
from memjax.interop.folders import file_in, read_json

JSON, MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
"""A tokenizer of the tokenizers library, one of SentencePiece, and the names of the special tokens."""
ADDED, GENERATION = "added_tokens.json", "generation_config.json"
"""Ids of tokens added after the tokenizer's training, and tokens at which generation ends."""


class ContradictionError(DataError):
    """The files of a folder contradict each other, so that no choice among them is right."""


class TokenizerFiles:
    """The JSON files next to a tokenizer."""

    def __init__(self, path: pathlib.Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self.settings = self._read(SETTINGS)
        self.generation = self._read(GENERATION)
        self.description = self._read_description()

    def take(self, path: pathlib.Path) -> None:
        """Takes the description of the tokenizer from a file, if it is a tokenizer.json."""
        if path.suffix == ".json" and not self.is_own_json(path):
            try:
                self.description = read_json(path)
            except CheckpointError:
                self.description = {}  # opening it as a tokenizer reports what is wrong

    def is_own_json(self, path: pathlib.Path) -> bool:
        """Whether a path names the folder's own tokenizer.json."""
        return path.resolve() == (self.path / JSON).resolve()

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(file_in(self.path, name)) if (self.path / name).exists() else {}

    def _read_description(self) -> dict[str, Any]:
        try:
            return self._read(JSON)
        except CheckpointError:
            return {}  # opening it as a tokenizer reports what is wrong, and a tokenizer.model may not need it

    def added_tokens(self) -> dict[int, str]:
        """Names of added tokens by id, from all files.

        Raises:
            DataError: two files give an id different names, or a token different ids.
        """
        found: dict[int, str] = {}
        ids: dict[str, int] = {}
        for file, token, name in self._added_tokens():
            if found.setdefault(token, name) != name or ids.setdefault(name, token) != token:
                raise ContradictionError(
                    f"{self.path / file}: gives the added token {name!r} the id {token}, another file of the folder "
                    "says otherwise; save the tokenizer again with the program that made it"
                )
        return found

    def _added_tokens(self) -> Iterator[tuple[str, int, str]]:
        try:
            for token in self.description.get("added_tokens") or ():
                yield JSON, int(token["id"]), str(token["content"])
            for index, token in (self.settings.get("added_tokens_decoder") or {}).items():
                yield SETTINGS, int(index), str(token["content"])
            for name, index in self._read(ADDED).items():
                yield ADDED, int(index), name
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(
                f"{self.path}: an entry of its added tokens is malformed ({type(error).__name__}: {error}); download "
                "the tokenizer's files again"
            ) from error

    def named(self, which: str) -> str | None:
        """The token that tokenizer_config.json names as bos or eos; None if it names none."""
        name = self.settings.get(f"{which}_token")
        name = name.get("content") if isinstance(name, dict) else name
        return name if isinstance(name, str) else None

    def flag(self, name: str) -> bool | None:
        """A flag of tokenizer_config.json; None if it is null or missing.

        Raises:
            DataError: its value does not mean true or false.
        """
        value = self.settings.get(name)
        word = value.lower() if isinstance(value, str) else value
        if value is None or isinstance(value, bool):
            return value
        if word not in ("true", "false", 0, 1):
            raise ContradictionError(f"{self.path / SETTINGS}: {name}={json.dumps(value)} must be true, false or null")
        return word in ("true", 1)

    def heeds_flag(self) -> bool:
        """Whether transformers 4 obeys add_bos_token for the tokenizer's class; other classes ignore it."""
        name = self.settings.get("tokenizer_class") or "Llama"
        return any(kind in str(name) for kind in ("Llama", "Gemma", "Cohere"))

    def ids(self, which: str) -> list[int]:
        """The ids that the model's files give for bos or eos; generation_config.json wins, as in transformers.

        Raises:
            DataError: an id is not an integer.
        """
        field = f"{which}_token_id"
        found = self.generation.get(field)
        found = self.config.get(field) if found is None else found
        tokens = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
        if wrong := [token for token in tokens if not isinstance(token, int) or isinstance(token, bool)]:
            raise ContradictionError(
                f"{self.path}: {field}={wrong[0]!r} must be the id of a token, a list of ids or null; correct it in "
                f"{GENERATION} or config.json"
            )
        return tokens

    def prompt_prefix(self) -> list[int] | None:
        """Ids that tokenizer.json's post-processor prepends to texts; None if the file cannot be opened."""
        try:
            tokenizer = read_description(self.description)
        except ValueError:
            return None
        marked, plain = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        starts = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
        return marked[: next(starts, 0)]
