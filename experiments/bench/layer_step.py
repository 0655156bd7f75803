"""A training step of one memory layer and its table, as the benches of operations and of devices time it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import memjax
from memjax.memory.read import TableName


def layer_step(
    layer: memjax.MemoryLayer,
    *,
    zeros: Callable[[Any], Any],
    bag: Callable[..., Any],
    update: Callable[..., Any],
) -> tuple[nnx.State, Callable[..., Any]]:
    """The layer's parameters, and step((table, moments), params, x, target): forward, backward, update of the table.

    Args:
        layer: the layer.
        zeros: the perturbation that the table needs.
        bag: of the table, indices, weights and perturbation.
        update: of the table, its moments and the gradients of its rows; returns the new pair.
    """
    graphdef, params = nnx.split(layer)

    def loss_fn(params, perturbations, rows, x, target):
        layer = nnx.merge(graphdef, params)
        lookup = layer.lookup(x)
        read = memjax.TableRead(TableName("table"), *lookup, vectors=None)
        out = layer.combine(x, bag(rows, *lookup, perturbations["memory"][0]))
        return jnp.mean((out * target).astype(jnp.float32)), ({"memory": (read,)}, None)

    def step(state, params, x, target):
        table, moments = state
        value_and_grad = memjax.row_sparse_value_and_grad(loss_fn)
        _, gradient, rows = value_and_grad(params, {"memory": (zeros(table),)}, table, x, target)
        # Sums make sure that the whole gradient is computed, but write little.
        return update(table, moments, rows["table"]), jax.tree.map(jnp.sum, gradient)

    return params, step
