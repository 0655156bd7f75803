"""Sorts the picks of all gradients of a table by row."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.ops.row_gradient import RowGradient

MOST_PICKS = 2**31 - 1
"""Maximum number that can be sorted at once, since picks are counted in 32 bits."""


def sorted_picks(gradients: Sequence[RowGradient]) -> tuple[Int[Array, " m"], Int[Array, " m"], Float[Array, " m"]]:
    """Row, token (in the concatenated vectors) and weight of every pick of all gradients, sorted by row.

    Raises:
        ValueError: there are more picks than 32 bits can count.
    """
    if (total := sum(gradient.indices.size for gradient in gradients)) > MOST_PICKS:
        raise ValueError(
            f"{total:,} picks cannot be sorted at once, at most {MOST_PICKS:,} can; use fewer tokens, or sum them into "
            "a dense gradient (row_update.dense; in a run, set mesh.row_grad_reduce: all_reduce)"
        )
    rows, tokens, weights, first = [], [], [], 0
    for gradient in gradients:
        count, picks = gradient.indices.shape
        rows.append(gradient.indices.reshape(-1))
        tokens.append(jnp.repeat(first + jnp.arange(count, dtype=jnp.int32), picks))
        weights.append(gradient.weights.reshape(-1))
        first += count
    sorted_rows, order = jax.lax.sort_key_val(jnp.concatenate(rows), jnp.arange(sum(row.size for row in rows)))
    return sorted_rows, jnp.concatenate(tokens)[order], jnp.concatenate(weights)[order]
