"""The tokenizer of a Hugging Face folder as one of this project, and the other way round."""

import base64
import json
import pathlib
from typing import Any

from memjax.config import TokenizerConfig
from memjax.data.tokenizer import Tokenizer, byte_letters
from memjax.data.tokenizer_files import open_tokenizer
from memjax.errors import ConfigError, DataError
from memjax.interop.folders import file_in, read_json, write_json

JSON, MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
"""A tokenizer of the tokenizers library, one of SentencePiece, and the names of the special tokens."""
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
        DataError: there is none that can be read.
        ConfigError: the chosen file is of no known kind.
    """
    if chosen == "byte":
        settings = TokenizerConfig(kind="byte")
        return settings, open_tokenizer(settings)
    if chosen is not None:
        return _open(pathlib.Path(chosen), folder, config)
    problems = []
    # Llama 2 and early Mistrals have both, and only the second is of use.
    for name in (JSON, MODEL):
        if (folder / name).exists():
            try:
                return _open(file_in(folder, name), folder, config)
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join([*problems, _ADVICE]))
    raise DataError(f"{folder}: there is neither {JSON} nor {MODEL}; {_ADVICE}")


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> bool:
    """Writes the files that transformers reads a tokenizer from; False where it has none of this kind."""
    state = tokenizer.to_state()
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    settings = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    if tokenizer.kind == "sentencepiece":
        (folder / MODEL).write_bytes(base64.b64decode(state["model"]))
        write_json(folder / SETTINGS, {"tokenizer_class": "LlamaTokenizer", **settings})
        return True
    if tokenizer.kind == "hf":
        description = state["json"]
    elif tokenizer.kind == "bpe":
        description = _with_special(state["bpe"], tokenizer)
    elif tokenizer.kind == "byte":
        description = _with_special(_bytes_as_bpe(tokenizer), tokenizer)
    else:
        return False
    write_json(folder / JSON, description)
    write_json(folder / SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    return True


def _open(path: pathlib.Path, folder: pathlib.Path, config: dict[str, Any]) -> tuple[TokenizerConfig, Tokenizer]:
    kinds = {".json": "hf", ".model": "sentencepiece"}
    if path.suffix not in kinds:
        raise ConfigError([f"tokenizer={path} must be byte, or a file that ends in .json or .model"])
    if kinds[path.suffix] == "sentencepiece":
        settings = TokenizerConfig(kind="sentencepiece", path=str(path))  # whose file says what begins and ends texts
    else:
        bos, eos = (_special_name(path, folder, config, which) for which in ("bos", "eos"))
        settings = TokenizerConfig(kind="hf", path=str(path), bos=bos, eos=eos)
    return settings, open_tokenizer(settings)


def _special_name(path: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], which: str) -> str | None:
    """The special token that begins (bos) or ends (eos) texts, as the folder says; None where it does not."""
    try:
        added = json.loads(path.read_bytes())["added_tokens"]
        special = {token["id"]: token["content"] for token in added if token["special"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None  # opening it will tell what is wrong
    settings = read_json(file_in(folder, SETTINGS)) if (folder / SETTINGS).exists() else {}
    name = settings.get(f"{which}_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name in special.values():
        return name
    token = config.get(f"{which}_token_id")
    token = token[0] if isinstance(token, list) and token else token  # Llama 3.1 has several that end a text
    return special.get(token) if isinstance(token, int) else None


def _with_special(bpe: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The description of a BPE that knows its special tokens inside texts, as transformers expects it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": token, "content": name, **plain} for name, token in tokenizer.special_tokens.items()]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {**bpe, "added_tokens": added, "decoder": decoder}


def _bytes_as_bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """A BPE without merges, which encodes a text as its bytes."""
    first = tokenizer.vocab_size - 256
    vocab = dict(tokenizer.special_tokens) | {letter: first + byte for byte, letter in enumerate(byte_letters())}
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "pre_tokenizer": before, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
