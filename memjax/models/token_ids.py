"""Token ids that a model has no embedding of: refused where their values are known."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

TOKENIZER = "take the tokenizer that the model was trained with"


def check_ids(ids: Int[Array, "..."] | Int[np.ndarray, "..."] | Sequence[int], vocab_size: int, name: str) -> None:
    """Refuses ids outside the vocabulary. Traced ids, and arrays that other processes hold a part of, pass.

    Raises:
        ValueError: an id is no whole number, negative, or not below vocab_size.
    """
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    values = np.asarray(ids)
    if values.dtype.kind in "fO" and isinstance(ids, Sequence) and all(type(one) is int for one in ids):
        values = np.array(ids, object)  # NumPy makes floats of what 64 bits do not hold
    elif values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, not of type {values.dtype}")
    for token in (values.min(), values.max()) if values.size else ():
        if not 0 <= token < vocab_size:
            way_out = "mask padding and use id 0 there" if token < 0 else TOKENIZER
            raise ValueError(f"{name} hold {token}; the model knows 0..{vocab_size - 1}: {way_out}")


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Refuses a tokenizer with more tokens than a model.

    Raises:
        ValueError: the tokenizer has more.
    """
    if tokens > vocab_size:
        raise ValueError(f"the tokenizer has {tokens:,} tokens, the model {vocab_size:,}: {TOKENIZER}")
