"""Refuses token ids for which a model has no embedding, if their values are known."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

TOKENIZER = "use the tokenizer that the model was trained with"


def check_ids(ids: Int[Array, "..."] | Int[np.ndarray, "..."] | Sequence[int], vocab_size: int, name: str) -> None:
    """Raises ValueError for ids that are not integers in 0..vocab_size - 1.

    Traced ids, and arrays that are partly in other processes, pass.
    """
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    values = np.asarray(ids)
    if values.dtype.kind in "fO" and isinstance(ids, Sequence) and all(type(one) is int for one in ids):
        values = np.array(ids, object)  # NumPy turns integers beyond 64 bits into floats
    elif values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, not of type {values.dtype}")
    for token in (values.min(), values.max()) if values.size else ():
        if not 0 <= token < vocab_size:
            way_out = "mask padding and use id 0 there" if token < 0 else TOKENIZER
            raise ValueError(f"{name} hold {token}; the model knows 0..{vocab_size - 1}: {way_out}")


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Raises ValueError for a tokenizer with more tokens than the model."""
    if tokens > vocab_size:
        raise ValueError(f"the tokenizer has {tokens:,} tokens, the model {vocab_size:,}: {TOKENIZER}")
