"""Gradients that keep the tables' part factored: no array of a table's size besides the table."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from memjax.memory.layer import Lookup
from memjax.ops.row_gradient import RowGradient

Taps = Mapping[str, Array]
"""Zeros of the bags' shapes, by the name of the layer."""


def row_sparse_value_and_grad(
    loss_fn: Callable[..., tuple[Array, tuple[Mapping[str, Lookup], Any]]],
) -> Callable[..., tuple[tuple[Array, Any], Any, dict[str, RowGradient]]]:
    """Like `jax.value_and_grad(loss_fn, has_aux=True)`, with row gradients in place of dense gradients of the tables.

    `loss_fn(params, taps, *args)` returns `loss, (lookups, aux)`. It must not differentiate the tables (close over them
    or pass them in args) and adds `taps[name]` to the bag of layer `name`, and returns its `Lookup` as `lookups[name]`:

        def loss_fn(params, taps, table, x, y):
            layer = nnx.merge(graphdef, params)
            lookup = layer.lookup(x)
            out = layer.combine(x, layer.read(table, lookup, taps["memory"]))
            return jnp.mean((out - y) ** 2), ({"memory": lookup}, None)

        taps = {"memory": zero_tap(num_tokens, value_dim, table.rows.dtype)}
        (loss, aux), grads, rows = row_sparse_value_and_grad(loss_fn)(params, taps, table, x, y)
        new_rows, state = row_update(table.rows[...], state, [rows["memory"]], rule, row_step(lr, step))

    Since d bag / d tap = 1, a tap's cotangent is the bag's, and with the lookup it holds the table's whole gradient.

    Returns:
        A function of `(params, taps, *args)` that returns `(loss, aux)`, the gradient of `params`, and
        RowGradients by layer.
    """

    def value_and_grad(params: Any, taps: Taps, *args: Any):
        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (lookups, aux)), (gradient, bags) = differentiate(params, taps, *args)
        if set(lookups) != set(taps):
            raise ValueError(f"loss_fn returned lookups of {sorted(lookups)} for taps of {sorted(taps)}")
        rows = {name: RowGradient(lookups[name].indices, lookups[name].weights, bags[name]) for name in taps}
        return (loss, aux), gradient, rows

    return value_and_grad
