"""Reads the tokenizer of a Hugging Face folder."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from memjax.config.data import TokenizerConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.open import open_tokenizer, sentencepiece_pieces, special_tokens_of
from memjax.errors import ConfigError, DataError
from memjax.interop.folders import file_in
from memjax.interop.huggingface.tokenizer_files import JSON, MODEL, SETTINGS, ContradictionError, TokenizerFiles
from memjax.io.console import warn
from memjax.io.paths import local_path

ADVICE = (
    "set --tokenizer to a tokenizer.json with a byte-level BPE or to a SentencePiece .model, or to byte, with which "
    "the model can be called with token ids only"
)
"""What to do if a folder has no readable tokenizer."""


def read_tokenizer(
    folder: pathlib.Path, chosen: str | os.PathLike[str] | None, config: dict[str, Any]
) -> tuple[TokenizerConfig, Tokenizer]:
    """The tokenizer of a model (bytes, that of the chosen file, or the folder's own), and the settings that open it.

    Raises:
        DataError: there is none that can be read, or the folder's files contradict each other.
        ConfigError: the chosen file is of an unknown kind.
        CheckpointError: a JSON file in the folder cannot be read.
    """
    if chosen == "byte":
        settings = TokenizerConfig(kind="byte")
        return settings, open_tokenizer(settings)
    if chosen is not None:
        return _open(local_path(chosen, "tokenizer", ConfigError), TokenizerFiles(folder, config))
    problems = []
    # Llama 2 and early Mistrals have both, but only the second can be read.
    for name in (JSON, MODEL):
        if (folder / name).exists():
            try:
                return _open(file_in(folder, name), TokenizerFiles(folder, config))
            except ContradictionError:
                raise
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join([*problems, ADVICE]))
    raise DataError(f"{folder}: there is neither {JSON} nor {MODEL}; {ADVICE}")


def _open(path: pathlib.Path, folder: TokenizerFiles) -> tuple[TokenizerConfig, Tokenizer]:
    kinds = {".json": "hf", ".model": "sentencepiece"}
    if path.suffix not in kinds:
        raise ConfigError(f"tokenizer={path} must be byte, or a file that ends in .json or .model")
    folder.take(path)
    if kinds[path.suffix] == "sentencepiece":
        settings = TokenizerConfig(kind="sentencepiece", path=str(path), added_tokens=_after_pieces(path, folder))
    else:
        settings = TokenizerConfig(kind="hf", path=str(path))
    # Opened first without bos and eos, whose names follow from the ids of the special tokens.
    tokens = special_tokens_of(settings)
    if settings.kind == "hf":
        _check_added(path, folder, tokens)
    names = {token: name for name, token in tokens.items()}
    bos, eos = (_special_name(folder, names, which) for which in ("bos", "eos"))
    settings = dataclasses.replace(settings, bos=bos, eos=eos)
    tokenizer = open_tokenizer(settings)
    used = {"adds_bos": _adds_bos(path, folder, tokenizer), "end_tokens": _end_tokens(folder, names, tokenizer)}
    return dataclasses.replace(settings, **used), tokenizer.configure(**used)


def _after_pieces(path: pathlib.Path, folder: TokenizerFiles) -> tuple[str, ...]:
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
            raise ContradictionError(
                f"{path}: its piece {token} is {pieces[token]!r}, the folder's other files call that token {name!r}: "
                "they belong to different tokenizers; set --tokenizer to the right file"
            )
    ids = sorted(token for token in added if token >= len(pieces))
    if ids != list(range(len(pieces), len(pieces) + len(ids))):
        raise ContradictionError(
            f"{path}: the folder adds tokens with the ids {ids[:8]} to {len(pieces)} pieces; ids must follow each "
            "other from the last piece on"
        )
    return tuple(added[token] for token in ids)


def _check_added(path: pathlib.Path, folder: TokenizerFiles, special: Mapping[str, int]) -> None:
    """Refuses a tokenizer.json that lacks tokens added by the files next to it."""
    if not folder.is_own_json(path):
        return
    known = {int(token["id"]): token["content"] for token in folder.description.get("added_tokens") or ()}
    vocab = (folder.description.get("model") or {}).get("vocab") or {}
    for token, name in folder.added_tokens().items():
        if known.get(token) != name and vocab.get(name) != token and special.get(name) != token:
            raise ContradictionError(
                f"{path}: lacks the token {name!r} with the id {token}, which the files next to it add; save the "
                "tokenizer again with transformers, which writes it into tokenizer.json"
            )


def _special_name(folder: TokenizerFiles, names: Mapping[int, str], which: str) -> str | None:
    """The special token that begins (bos) or ends (eos) texts, if the folder names one."""
    name = folder.named(which)
    if name in names.values():
        return name
    return next((names[token] for token in folder.ids(which) if token in names), None)


def _end_tokens(folder: TokenizerFiles, names: Mapping[int, str], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens besides eos at which the model ends texts."""
    found = []
    for token in folder.ids("eos"):
        if token >= tokenizer.vocab_size:
            raise ContradictionError(
                f"{folder.path}: eos_token_id={token} is beyond the {tokenizer.vocab_size} tokens of the tokenizer, so "
                "the model would end its texts with a token that has no name; set --tokenizer to the file that belongs "
                "to the model"
            )
        if token in names:
            found.append(names[token])
        else:
            warn(
                f"warning: {folder.path}: eos_token_id={token} is not a special token, so generation does not end there"
            )
    return tuple(name for name in dict.fromkeys(found) if tokenizer.special_tokens[name] != tokenizer.eos_id)


def _adds_bos(path: pathlib.Path, folder: TokenizerFiles, tokenizer: Tokenizer) -> bool:
    """Whether the model's prompts start with the begin token, by tokenizer_config.json or else by tokenizer.json.

    Raises:
        DataError: prompts start with other special tokens, or `add_bos_token` is not a flag.
    """
    if folder.flag("add_eos_token"):
        warn(f"warning: {folder.path / SETTINGS}: add_eos_token is not kept: prompts do not end with the end token")
    said, prefix = folder.flag("add_bos_token"), folder.prompt_prefix()
    if prefix is None:
        # As LlamaTokenizer does without tokenizer.json, where null means false.
        return "add_bos_token" not in folder.settings if said is None else said
    in_json = bool(prefix)
    if said is None or not folder.heeds_flag():
        if prefix not in ([], [tokenizer.bos_id]):
            raise ContradictionError(
                f"{path}: its post-processor begins prompts with the tokens {prefix}, memjax begins them with bos "
                f"({tokenizer.bos_id}) or nothing; set bos_token in {SETTINGS} if it is one token, or --tokenizer to "
                "another file"
            )
        used = in_json
    else:
        used = said
    if said not in (None, in_json):
        warn(
            f"warning: {folder.path}: add_bos_token={json.dumps(said)} in {SETTINGS}, but the post-processor of {JSON} "
            f"begins texts {'with' if in_json else 'without'} the begin token; prompts begin "
            f"{'with' if used else 'without'} it"
        )
    return used
