"""Row-sparse gradients of pure functions: the gradient of a table stays factored."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from memjax.memory.read import Perturbations, Reads, row_gradients
from memjax.ops.row_gradient import RowGradient

Loss = Callable[..., tuple[Array, tuple[Reads, Any]]]
"""(params, perturbations, *args) -> loss, (reads, aux)."""


def perturbed_value_and_grad(loss_fn: Loss) -> Callable[..., tuple[tuple[Array, Any], Any, Reads, dict[str, Any]]]:
    """`row_sparse_value_and_grad`, but returns reads and cotangents by layer instead of row gradients by table."""

    def value_and_grad(params: Any, perturbations: Mapping[str, Perturbations], *args: Any):
        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (reads, aux)), (gradient, cotangents) = differentiate(params, perturbations, *args)
        if set(reads) != set(perturbations):
            raise ValueError(f"loss_fn returned reads of {sorted(reads)} for perturbations of {sorted(perturbations)}")
        return (loss, aux), gradient, reads, cotangents

    return value_and_grad


def row_sparse_value_and_grad(
    loss_fn: Loss,
) -> Callable[..., tuple[tuple[Array, Any], Any, dict[str, list[RowGradient]]]]:
    """Like `jax.value_and_grad(loss_fn, has_aux=True)`, with row gradients in place of dense gradients of the tables.

    The explicit form of `memjax.value_and_grad`, for pure functions. `loss_fn(params, perturbations, *args)` returns
    `loss, (reads, aux)`. Tables must not be in params (close over them or pass them in args). `loss_fn` passes
    `perturbations[name]` to layer `name`, and returns the layer's reads as `reads[name]`:

        def loss_fn(params, perturbations, table, x, y):
            layer = nnx.merge(graphdef, params)
            out, reads = layer.with_reads(x, table, perturbations=perturbations["memory"])
            return jnp.mean((out - y) ** 2), ({"memory": reads}, None)

        perturbations = {"memory": layer.zero_perturbations(num_tokens, table)}
        (loss, aux), grads, rows = row_sparse_value_and_grad(loss_fn)(params, perturbations, table, x, y)
        new_rows, state = row_update(table.rows[...], state, rows[table.name], rule, row_step(lr, step))

    Since d bag / d perturbation = 1, a perturbation's cotangent is the bag's; together with the read, it makes up the
    table's gradient. The same holds for dots. Tables are identified by their names.

    Returns:
        A function of `(params, perturbations, *args)` that returns `(loss, aux)`, the gradient of `params`, and the
        RowGradients of each table, by its name.
    """
    differentiate = perturbed_value_and_grad(loss_fn)

    def value_and_grad(params: Any, perturbations: Mapping[str, Perturbations], *args: Any):
        value, gradient, reads, cotangents = differentiate(params, perturbations, *args)
        return value, gradient, row_gradients(reads, cotangents)

    return value_and_grad
