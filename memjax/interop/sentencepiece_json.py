"""Converts a SentencePiece BPE model to a tokenizer.json, which all versions of transformers read the same way."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from memjax.data.tokenizers.hf import read_description
from memjax.data.tokenizers.round_trip import probe_texts
from memjax.data.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer

SPECIAL_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""Flags of special tokens in a tokenizer.json."""
_MIXTURES = 2000
"""Random texts of several pieces that both must encode identically."""


def sentencepiece_as_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """A tokenizer.json that encodes exactly as the model does; None if there is none.

    transformers 5 converts .model files itself, and then drops a leading space from texts. Models that are not BPE,
    normalise texts or have user-defined pieces encode differently, which the probe texts reveal.
    """
    description = _description(tokenizer)
    try:
        library = read_description(description)
    except ValueError:
        return None
    library.encode_special_tokens = True
    pieces = [piece.replace(SPACE, " ") for piece in tokenizer.pieces]
    draw = random.Random(0)
    mixtures = ["".join(draw.choices(pieces, k=8)) for _ in range(_MIXTURES)]
    texts = [*probe_texts(), *(f"a{piece}b" for piece in pieces), *mixtures]
    encoded = library.encode_batch(texts, add_special_tokens=False)
    same = all(one.ids == ids for one, ids in zip(encoded, tokenizer.encode_batch(texts), strict=True))
    return description if same else None


def _description(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    vocab = {piece: token for token, piece in enumerate(tokenizer.pieces)}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.adds_leading_space else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    added = [{"id": token, "content": name, **SPECIAL_FLAGS} for name, token in tokenizer.special_tokens.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in _merges(tokenizer.pieces, vocab)],
        },
    }


def _merges(pieces: list[str], vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that merge into a piece, in the order of the latter: BPE pieces are in order of merging."""
    for piece in pieces:
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        yield from sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
