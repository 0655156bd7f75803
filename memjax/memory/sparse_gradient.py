"""Gradients that keep the tables' part factored: no array of a table's size besides the table."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from memjax.memory.keys import Lookup
from memjax.memory.peer import ExpertReads

Taps = Mapping[str, Any]
"""Zeros, by the name of the layer: of a memory layer of the shape of its bags, of an expert lookup `ExpertTaps`."""
Reads = Mapping[str, Lookup | ExpertReads]
"""What was read, by the name of the layer."""


def row_sparse_value_and_grad(
    loss_fn: Callable[..., tuple[Array, tuple[Reads, Any]]],
) -> Callable[..., tuple[tuple[Array, Any], Any, dict[str, Any]]]:
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

    An expert lookup takes the two taps of `layer.zero_taps` together and returns what it read, which stands among the
    lookups: `out, lookups[name] = layer.read(x, layer.lookup(x), inputs, outputs, taps[name])`. rows[name] then has the
    row gradients `inputs` and `outputs`.

    Since d bag / d tap = 1, a tap's cotangent is the bag's, and with the lookup it holds the table's whole gradient; so
    it is with dots.

    Returns:
        A function of `(params, taps, *args)` that returns `(loss, aux)`, the gradient of `params`, and
        RowGradients (of an expert lookup ExpertRowGradients) by layer.
    """

    def value_and_grad(params: Any, taps: Taps, *args: Any):
        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (lookups, aux)), (gradient, cotangents) = differentiate(params, taps, *args)
        if set(lookups) != set(taps):
            raise ValueError(f"loss_fn returned lookups of {sorted(lookups)} for taps of {sorted(taps)}")
        rows = {name: lookups[name].row_gradients(cotangents[name]) for name in taps}
        return (loss, aux), gradient, rows

    return value_and_grad
