"""The tokenizer of a Hugging Face folder as one of this project, and the other way round."""

import base64
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.bpe import byte_letters
from memjax.data.tokenizers.hf import read_description
from memjax.data.tokenizers.open import open_tokenizer, sentencepiece_pieces, special_tokens_of
from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.interop.folders import file_in, read_json, write_json
from memjax.interop.sentencepiece_json import SPECIAL_FLAGS, sentencepiece_as_json
from memjax.io.console import say

JSON, MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
"""A tokenizer of the tokenizers library, one of SentencePiece, and the names of the special tokens."""
ADDED, GENERATION = "added_tokens.json", "generation_config.json"
"""Ids of tokens that were added after the tokenizer's training, and at which tokens generation ends."""
_ADVICE = (
    "set --tokenizer to a tokenizer.json with a byte-level BPE or to a SentencePiece .model, or to byte, with which "
    "the model can be called with token ids, but knows no text"
)


def read_tokenizer(
    folder: pathlib.Path, chosen: str | None, config: dict[str, Any]
) -> tuple[TokenizerConfig, Tokenizer]:
    """The tokenizer of a model, and the settings that open it.

    Args:
        folder: the model's.
        chosen: `byte`, or the file to take; None takes what lies in the folder.
        config: the model's config.json, which knows the ids of the tokens that begin and end a text.

    Raises:
        DataError: there is none that can be read, or the folder's files contradict each other.
        ConfigError: the chosen file is of no known kind.
        CheckpointError: a JSON file in the folder cannot be read.
    """
    if chosen == "byte":
        settings = TokenizerConfig(kind="byte")
        return settings, open_tokenizer(settings)
    if chosen is not None:
        return _open(pathlib.Path(chosen), _Folder(folder, config))
    problems = []
    # Llama 2 and early Mistrals have both, and only the second is of use.
    for name in (JSON, MODEL):
        if (folder / name).exists():
            try:
                return _open(file_in(folder, name), _Folder(folder, config))
            except _Contradiction:
                raise
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join([*problems, _ADVICE]))
    raise DataError(f"{folder}: there is neither {JSON} nor {MODEL}; {_ADVICE}")


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> bool:
    """Writes the files that transformers reads a tokenizer from; False where it has none of this kind."""
    state = tokenizer.to_state()
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    settings = {
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        # transformers would delete spaces before punctuation from texts.
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.kind == "sentencepiece":
        (folder / MODEL).write_bytes(base64.b64decode(state["model"]))
        added = {tokenizer.special_tokens[name]: name for name in state.get("added_tokens", ())}
        if added:
            write_json(folder / ADDED, {name: token for token, name in added.items()})
            settings["added_tokens_decoder"] = {
                str(token): {"content": name, **SPECIAL_FLAGS} for token, name in added.items()
            }
        description = sentencepiece_as_json(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else None
    elif tokenizer.kind == "hf":
        description = state["json"]
    elif tokenizer.kind == "bpe":
        description = _with_special(state["bpe"], tokenizer)
    elif tokenizer.kind == "byte":
        description = _with_special(_bytes_as_bpe(tokenizer), tokenizer)
    else:
        return False
    if description is not None:
        write_json(folder / JSON, _with_begin(description, tokenizer, names[tokenizer.bos_id]))
    name = "LlamaTokenizer" if description is None else "PreTrainedTokenizerFast"
    write_json(folder / SETTINGS, {"tokenizer_class": name, **settings})
    return True


def _is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


class _Contradiction(DataError):
    """The files of a folder contradict each other, so that no choice among them is right."""


class _Folder:
    """What the JSON files next to a tokenizer say of it."""

    def __init__(self, path: pathlib.Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self.settings = self._read(SETTINGS)
        self.generation = self._read(GENERATION)
        self.description = self._read_description()

    def take(self, path: pathlib.Path) -> None:
        """Takes the file that was chosen for the description of the tokenizer, if it is a tokenizer.json."""
        if path.suffix == ".json" and not _is_same(path, self.path / JSON):
            try:
                self.description = read_json(path)
            except CheckpointError:
                self.description = {}  # opening it as a tokenizer says what is wrong

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(file_in(self.path, name)) if (self.path / name).exists() else {}

    def _read_description(self) -> dict[str, Any]:
        try:
            return self._read(JSON)
        except CheckpointError:
            return {}  # opening it as a tokenizer says what is wrong, and a tokenizer.model may do without it

    def added_tokens(self) -> dict[int, str]:
        """Names of added tokens by id, as all files say.

        Raises:
            DataError: two files give an id different names, or a token different ids.
        """
        found: dict[int, str] = {}
        ids: dict[str, int] = {}
        for file, token, name in self._added_tokens():
            if found.setdefault(token, name) != name or ids.setdefault(name, token) != token:
                raise _Contradiction(
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
        """The token that tokenizer_config.json names as bos or eos; None where it names none."""
        name = self.settings.get(f"{which}_token")
        name = name.get("content") if isinstance(name, dict) else name
        return name if isinstance(name, str) else None

    def flag(self, name: str) -> bool | None:
        """A flag of tokenizer_config.json; None where it is null or not there.

        Raises:
            DataError: it is neither true nor false, nor a way to write them.
        """
        value = self.settings.get(name)
        word = value.lower() if isinstance(value, str) else value
        if value is None or isinstance(value, bool):
            return value
        if word not in ("true", "false", 0, 1):
            raise _Contradiction(f"{self.path / SETTINGS}: {name}={json.dumps(value)} must be true, false or null")
        return word in ("true", 1)

    def heeds_flag(self) -> bool:
        """Whether the tokenizer's class has transformers 4 begin texts as add_bos_token says; others do not read it."""
        name = self.settings.get("tokenizer_class") or "Llama"
        return any(kind in str(name) for kind in ("Llama", "Gemma", "Cohere"))

    def ids(self, which: str) -> list[int]:
        """The ids that the model's files give for bos or eos; generation_config.json wins, as in transformers.

        Raises:
            DataError: one of them is no whole number.
        """
        field = f"{which}_token_id"
        found = self.generation.get(field)
        found = self.config.get(field) if found is None else found
        tokens = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
        if wrong := [token for token in tokens if not isinstance(token, int) or isinstance(token, bool)]:
            raise _Contradiction(
                f"{self.path}: {field}={wrong[0]!r} must be the id of a token, a list of ids or null; correct it in "
                f"{GENERATION} or config.json"
            )
        return tokens

    def prompt_prefix(self) -> list[int] | None:
        """Ids that tokenizer.json's post-processor puts in front of texts; None where it cannot be asked."""
        try:
            tokenizer = read_description({**self.description, "truncation": None, "padding": None})
        except ValueError:
            return None
        marked, plain = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        starts = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
        return marked[: next(starts, 0)]


def _open(path: pathlib.Path, folder: _Folder) -> tuple[TokenizerConfig, Tokenizer]:
    kinds = {".json": "hf", ".model": "sentencepiece"}
    if path.suffix not in kinds:
        raise ConfigError(f"tokenizer={path} must be byte, or a file that ends in .json or .model")
    folder.take(path)
    if kinds[path.suffix] == "sentencepiece":
        settings = TokenizerConfig(kind="sentencepiece", path=str(path), added_tokens=_after_pieces(path, folder))
    else:
        settings = TokenizerConfig(kind="hf", path=str(path))
    # First without begin and end, whose names the special tokens' ids tell.
    tokens = special_tokens_of(settings)
    if settings.kind == "hf":
        _check_added(path, folder, tokens)
    names = {token: name for name, token in tokens.items()}
    bos, eos = (_special_name(folder, names, which) for which in ("bos", "eos"))
    settings = dataclasses.replace(settings, bos=bos, eos=eos)
    tokenizer = open_tokenizer(settings)
    used = {
        "adds_bos": _adds_bos(path, folder, tokenizer),
        "end_tokens": _end_tokens(folder, names, tokenizer),
    }
    return dataclasses.replace(settings, **used), tokenizer.configure(**used)


def _after_pieces(path: pathlib.Path, folder: _Folder) -> tuple[str, ...]:
    """The added tokens that a SentencePiece .model lacks, in the order of their ids.

    Raises:
        DataError: they cannot follow the model's pieces, or tokenizer.json has other pieces than the model.
    """
    pieces = sentencepiece_pieces(path)
    vocab = folder.description.get("model") or {}
    vocab = vocab.get("vocab") if isinstance(vocab, dict) else None
    others = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):
        others = {entry[0]: number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = folder.added_tokens()
    for name, token in (*((name, token) for token, name in added.items()), *others.items()):
        if isinstance(token, int) and token < len(pieces) and pieces[token] != name:
            raise _Contradiction(
                f"{path}: its piece {token} is {pieces[token]!r}, the folder's other files call that token {name!r}: "
                "they belong to different tokenizers; set --tokenizer to the right file"
            )
    ids = sorted(token for token in added if token >= len(pieces))
    if ids != list(range(len(pieces), len(pieces) + len(ids))):
        raise _Contradiction(
            f"{path}: the folder adds tokens with the ids {ids[:8]} to {len(pieces)} pieces; ids must follow each "
            "other from the last piece on"
        )
    return tuple(added[token] for token in ids)


def _check_added(path: pathlib.Path, folder: _Folder, special: Mapping[str, int]) -> None:
    """Refuses a tokenizer.json that lacks tokens which the files next to it add."""
    if not _is_same(path, folder.path / JSON):
        return
    known = {int(token["id"]): token["content"] for token in folder.description.get("added_tokens") or ()}
    vocab = (folder.description.get("model") or {}).get("vocab") or {}
    for token, name in folder.added_tokens().items():
        if known.get(token) != name and vocab.get(name) != token and special.get(name) != token:
            raise _Contradiction(
                f"{path}: lacks the token {name!r} with the id {token}, which the files next to it add; save the "
                "tokenizer again with transformers, which writes it into tokenizer.json"
            )


def _special_name(folder: _Folder, names: Mapping[int, str], which: str) -> str | None:
    """The special token that begins (bos) or ends (eos) texts, as the folder says; None where it does not."""
    name = folder.named(which)
    if name in names.values():
        return name
    return next((names[token] for token in folder.ids(which) if token in names), None)


def _end_tokens(folder: _Folder, names: Mapping[int, str], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens besides eos at which the model ends texts."""
    found = []
    for token in folder.ids("eos"):
        if token >= tokenizer.vocab_size:
            raise _Contradiction(
                f"{folder.path}: eos_token_id={token} is beyond the {tokenizer.vocab_size} tokens of the tokenizer, so "
                "the model would end its texts with a token that has no name; set --tokenizer to the file that belongs "
                "to the model"
            )
        if token in names:
            found.append(names[token])
        else:
            say(f"warning: {folder.path}: eos_token_id={token} is no special token, so generation does not end there")
    return tuple(name for name in dict.fromkeys(found) if tokenizer.special_tokens[name] != tokenizer.eos_id)


def _adds_bos(path: pathlib.Path, folder: _Folder, tokenizer: Tokenizer) -> bool:
    """Whether prompts of the model begin with the begin token: tokenizer_config.json, else tokenizer.json say it.

    Raises:
        DataError: prompts begin with other special tokens, or `add_bos_token` is no flag.
    """
    if folder.flag("add_eos_token"):
        say(f"warning: {folder.path / SETTINGS}: add_eos_token is not kept: prompts do not end with the end token")
    said, prefix = folder.flag("add_bos_token"), folder.prompt_prefix()
    if prefix is None:
        # As LlamaTokenizer does without tokenizer.json; null is no there.
        return "add_bos_token" not in folder.settings if said is None else said
    in_json = bool(prefix)
    if said is None or not folder.heeds_flag():
        if prefix not in ([], [tokenizer.bos_id]):
            raise _Contradiction(
                f"{path}: its post-processor begins prompts with the tokens {prefix}, memjax begins them with bos "
                f"({tokenizer.bos_id}) or nothing; set bos_token in {SETTINGS} if it is one token, or --tokenizer to "
                "another file"
            )
        used = in_json
    else:
        used = said
    if said not in (None, in_json):
        say(
            f"warning: {folder.path}: add_bos_token={json.dumps(said)} in {SETTINGS}, but the post-processor of {JSON} "
            f"begins texts {'with' if in_json else 'without'} the begin token; prompts begin "
            f"{'with' if used else 'without'} it"
        )
    return used


def _with_begin(description: dict[str, Any], tokenizer: Tokenizer, bos: str) -> dict[str, Any]:
    """The description with a post-processor that begins texts as the tokenizer begins prompts."""
    found = read_description({**description, "truncation": None, "padding": None})
    plain = found.encode("a", add_special_tokens=False).ids
    wanted = [tokenizer.bos_id, *plain] if tokenizer.adds_bos else plain
    if found.encode("a").ids == wanted:
        return description
    if not tokenizer.adds_bos:
        return {**description, "post_processor": None}
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": first, "pair": [*first, *second]}
    return {**description, "post_processor": {**template, "special_tokens": special}}


def _with_special(bpe: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The description of a BPE that knows its special tokens inside texts, as transformers expects it."""
    added = [{"id": token, "content": name, **SPECIAL_FLAGS} for name, token in tokenizer.special_tokens.items()]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {**bpe, "added_tokens": added, "decoder": decoder}


def _bytes_as_bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """A BPE without merges, which encodes a text as its bytes."""
    first = tokenizer.vocab_size - 256
    vocab = dict(tokenizer.special_tokens) | {letter: first + byte for byte, letter in enumerate(byte_letters())}
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "pre_tokenizer": before, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
