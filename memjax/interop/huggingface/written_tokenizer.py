"""Writes a tokenizer as the files from which transformers reads it."""

import base64
import pathlib
from typing import Any

from memjax.data.tokenizers.base import Tokenizer
from memjax.data.tokenizers.bpe import byte_letters
from memjax.data.tokenizers.hf import read_description
from memjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from memjax.interop.folders import write_json
from memjax.interop.huggingface.tokenizer_files import ADDED, JSON, MODEL, SETTINGS
from memjax.interop.sentencepiece_json import SPECIAL_FLAGS, sentencepiece_as_json
from memjax.io.console import warn


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> bool:
    """Writes the files from which transformers reads a tokenizer; returns False if it has no such kind."""
    state = tokenizer.to_state()
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    settings: dict[str, Any] = {
        # By default transformers 4 also returns token types, which a decoder's `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        # `generate` continues the last position of each row, which must not be padding.
        "padding_side": "left",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        # transformers would delete spaces before punctuation from texts.
        "clean_up_tokenization_spaces": False,
    }
    # If the end token is also the padding token, transformers' collators exclude end tokens from the loss.
    if tokenizer.pad_id != tokenizer.eos_id:
        settings["pad_token"] = names[tokenizer.pad_id]
    if tokenizer.kind == "sentencepiece":
        (folder / MODEL).write_bytes(base64.b64decode(state["model"]))
        added = {tokenizer.special_tokens[name]: name for name in state.get("added_tokens", ())}
        if added:
            write_json(folder / ADDED, {name: token for token, name in added.items()})
            settings["added_tokens_decoder"] = {
                str(token): {"content": name, **SPECIAL_FLAGS} for token, name in added.items()
            }
        description = sentencepiece_as_json(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else None
        if description is None:
            warn(
                f"warning: transformers 5 converts {MODEL} itself and encodes some texts differently (runs of spaces, "
                "combining marks); pass ids of the sentencepiece library, or use transformers 4"
            )
    elif tokenizer.kind == "hf":
        description = state["json"]
    elif tokenizer.kind == "bpe":
        description = _with_special(state["bpe"], tokenizer)
    elif tokenizer.kind == "byte":
        description = _with_special(_bytes_as_bpe(tokenizer), tokenizer)
    else:
        return False
    if description is not None:
        before = description.get("pre_tokenizer") or {}
        if "add_prefix_space" in before:
            # Without it, transformers 4 would use its own default instead of the file's.
            settings["add_prefix_space"] = before["add_prefix_space"]
        write_json(folder / JSON, _with_begin(description, tokenizer, names[tokenizer.bos_id]))
    name = "LlamaTokenizer" if description is None else "PreTrainedTokenizerFast"
    write_json(folder / SETTINGS, {"tokenizer_class": name, **settings})
    return True


def _with_begin(description: dict[str, Any], tokenizer: Tokenizer, bos: str) -> dict[str, Any]:
    """The description with a post-processor that starts texts as the tokenizer starts prompts."""
    found = read_description(description)
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
    """The description of a BPE that recognises its special tokens inside texts, as transformers expects."""
    added = [{"id": token, "content": name, **SPECIAL_FLAGS} for name, token in tokenizer.special_tokens.items()]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {**bpe, "added_tokens": added, "decoder": decoder}


def _bytes_as_bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """A BPE without merges, which encodes a text as its bytes."""
    first = tokenizer.vocab_size - 256
    vocab = dict(tokenizer.special_tokens) | {letter: first + byte for byte, letter in enumerate(byte_letters())}
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "pre_tokenizer": before, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
