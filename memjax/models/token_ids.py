"""Token ids that a model has no embedding of: refused where their values are known."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def check_ids(ids: Int[Array, "..."] | Int[np.ndarray, "..."] | Sequence[int], vocab_size: int, name: str) -> None:
    """Refuses ids outside the vocabulary. Traced ids, and arrays that other processes hold a part of, pass.

    Args:
        ids: token ids.
        vocab_size: of the model.
        name: of the ids, for the message.

    Raises:
        ValueError: an id is negative, or not below vocab_size.
    """
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    values = np.asarray(ids)
    for token in (values.min(), values.max()) if values.size else ():
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} hold {token}; the model knows 0..{vocab_size - 1}: take the tokenizer that it was trained with"
            )
