"""The operations of a memory layer on a mesh with the axes ('data', 'memory').

Tokens are sharded over both axes, the columns of a table over `memory`; keys are replicated. Inside `shard_map`, each
device searches for its own tokens, gathers the picks of its memory group, and sums its own columns of all the group's
bags; an all-to-all returns whole bags to the devices that own the tokens. Dots go the opposite way: an all-to-all
distributes the columns of the vectors, and the partial products are summed on the device that owns the token.

The mesh is the ambient one (`jax.set_mesh`). Without a mesh, without both axes, or inside a `jax.shard_map` over them,
these are the plain operations, so one device, a mesh and a caller's own model run the same layer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from memjax.memory import row_grad_reduce
from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update import dense
from memjax.ops.row_update.api import check_state, row_update
from memjax.ops.row_update.rules import RowRule, RowStep, TableState
from memjax.ops.shapes import require
from memjax.ops.table import Table
from memjax.sharding import rules
from memjax.sharding.axes import alike_over_tensor, has_memory_axis, over_mesh, place, unsharded, unsharded_update

_FACTORS = RowGradient._make((rules.TOKENS, rules.TOKENS, rules.BAGS))
"""The sharding of a row gradient."""


def bag(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    perturbation: Float[Array, "t d"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "t d"]:
    """`embedding_bag` plus the perturbation, a zero whose cotangent is the cotangent of the bag.

    The perturbation is added before the all-to-all, so its cotangent is sharded by columns, as `update_rows` needs it.
    """
    _check_perturbation("bag", perturbation, (*indices.shape[:1], *table.shape[1:]), indices=indices, table=table)
    if _is_plain(indices):
        run = alike_over_tensor(partial(embedding_bag, mode="promise_in_bounds", implementation=implementation))
        return _perturbed(unsharded(run, indices)(table, indices, weights), perturbation)
    specs = (rules.COLUMNS, rules.TOKENS, rules.TOKENS, rules.BAGS)
    run = over_mesh(_bag_of_group, specs, rules.TOKENS, implementation=implementation)
    return run(table, indices, weights, perturbation)


@alike_over_tensor
def _bag_of_group(
    table: Table | Array, indices: Array, weights: Array, perturbation: Array | None, *, implementation: str | None
) -> Array:
    indices, weights = (jax.lax.all_gather(picks, rules.MEMORY, tiled=True) for picks in (indices, weights))
    out = embedding_bag(table, indices, weights, mode="promise_in_bounds", implementation=implementation)
    out = _perturbed(out, perturbation)
    return jax.lax.all_to_all(out, rules.MEMORY, split_axis=0, concat_axis=1, tiled=True)


def _check_perturbation(operation: str, perturbation: Array | None, shape: tuple[int, ...], **arrays: Any) -> None:
    if perturbation is not None:
        rule = f"a perturbation must have the shape of the {operation}s"
        require(operation, perturbation.shape == shape, rule, perturbation=perturbation, **arrays)


def _perturbed(out: Array, perturbation: Array | None) -> Array:
    return out if perturbation is None else out + perturbation


def dot(
    table: Table | Float[Array, "n d"],
    indices: Int[Array, "t k"],
    vectors: Float[Array, "t d"],
    perturbation: Float[Array, "t k"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "t k"], Float[Array, "t d"]]:
    """`embedding_dot` plus the perturbation, a zero whose cotangent is the cotangent of the dots; and the vectors.

    The vectors are returned sharded by columns, like the bags of `bag`, as `update_rows` needs them.
    """
    _check_perturbation("dot", perturbation, indices.shape, indices=indices)
    if _is_plain(indices):
        run = alike_over_tensor(partial(embedding_dot, mode="promise_in_bounds", implementation=implementation))
        return _perturbed(unsharded(run, indices)(table, indices, vectors), perturbation), vectors
    specs = (rules.COLUMNS, rules.TOKENS, rules.TOKENS, rules.TOKENS)
    run = over_mesh(_dot_of_group, specs, (rules.TOKENS, rules.BAGS), implementation=implementation)
    return run(table, indices, vectors, perturbation)


@alike_over_tensor
def _dot_of_group(
    table: Table | Array, indices: Array, vectors: Array, perturbation: Array | None, *, implementation: str | None
) -> tuple[Array, Array]:
    indices = jax.lax.all_gather(indices, rules.MEMORY, tiled=True)
    columns = jax.lax.all_to_all(vectors, rules.MEMORY, split_axis=1, concat_axis=0, tiled=True)
    out = embedding_dot(table, indices, columns, mode="promise_in_bounds", implementation=implementation)
    out = jax.lax.psum_scatter(out, rules.MEMORY, scatter_dimension=0, tiled=True)
    return _perturbed(out, perturbation), columns


class RowSum(NamedTuple):
    """The dense sum of a table's row gradients; on a mesh, each device has its own columns for its replica's tokens."""

    gradient: Float[Array, "replicas n d"]
    touched: Bool[Array, "replicas shards n"]
    """Whether any pick names the row."""

    def scaled(self, factor: ArrayLike) -> "RowSum":
        return self._replace(gradient=self.gradient * jnp.asarray(factor, self.gradient.dtype))


# Shardings in place of the arrays.
_ROW_SUM = RowSum(rules.REPLICA_COLUMNS, rules.REPLICA_SHARDS)  # pyright: ignore[reportArgumentType]


def update_rows(
    table: Float[Array, "n d"],
    state: TableState,
    gradients: Sequence[RowGradient] | RowSum,
    rule: RowRule,
    step: RowStep,
    *,
    collective: row_grad_reduce.CollectiveOption = "auto",
    implementation: str | None = None,
    piece_picks: int = dense.PIECE_PICKS,
    block_bytes: int = dense.BLOCK_BYTES,
) -> tuple[Float[Array, "n d"], TableState]:
    """`row_update` on every device's columns, with the picks of all tokens of the mesh.

    Replicas of a column shard see the same picks in the same order (all_gather), or the same total of the sums over
    their own tokens (all_reduce), so they stay bit-equal. See `row_grad_reduce.choose` for auto. Without a `memory`
    axis, there are no replicas and nothing crosses `data`.

    The gradients are those of all layers that read the table, or their sum by `add_rows`. If they are summed densely,
    piece_picks limits the picks that are sorted at once, and block_bytes the dense gradient that is applied at once.

    Raises:
        ValueError: shapes do not fit together, or `collective` or `implementation` is unknown.
    """
    check_state(table, state, rule)
    if isinstance(gradients, RowSum):
        return _update_rows_by_sum(table, state, gradients, rule, step, block_bytes)
    if not gradients:
        raise ValueError("update_rows needs at least one RowGradient")
    for gradient in gradients:
        gradient.check(table.shape[1])
    chosen = row_grad_reduce.choose(collective, table, gradients, **mesh_sizes())
    if all(_is_plain(gradient.indices) for gradient in gradients):
        run = lambda table, state, gradients, step: row_update(
            table, state, gradients, rule, step, implementation=implementation
        )
        return unsharded_update(alike_over_tensor(run), (table, state))(table, state, gradients, step)
    if chosen == "all_reduce":
        total = add_rows(no_rows(table, gradients), gradients, implementation=implementation, piece_picks=piece_picks)
        return _update_rows_by_sum(table, state, total, rule, step, block_bytes)
    specs = (rules.COLUMNS, rules.COLUMNS, (_FACTORS,) * len(gradients), rules.REPLICATED)
    run = over_mesh(_update_by_picks, specs, (rules.COLUMNS, rules.COLUMNS), rule=rule, implementation=implementation)
    return run(table, state, tuple(gradients), step)


@alike_over_tensor
def _update_by_picks(
    table: Array,
    state: TableState,
    gradients: Sequence[RowGradient],
    step: RowStep,
    *,
    rule: RowRule,
    implementation: str | None,
) -> tuple[Array, TableState]:
    """Updates a device's columns by the picks of all tokens."""
    gathered = [_gather_mesh(gradient) for gradient in gradients]
    return row_update(table, state, gathered, rule, _of_columns(step, table), implementation=implementation)


def no_rows(table: Float[Array, "n d"], after: Any = ()) -> RowSum:
    """An empty sum of row gradients, allocated only after the arrays of `after` have been computed."""
    replicas, shards = mesh_sizes().values()
    # Not a constant, which XLA could allocate long before.
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), accumulator(table.dtype)), after))
    total = RowSum(jnp.full((replicas, *table.shape), zero), jnp.zeros((replicas, shards, table.shape[0]), bool))
    if not has_memory_axis():
        return total
    return RowSum(place(total.gradient, rules.REPLICA_COLUMNS), place(total.touched, rules.REPLICA_SHARDS))


def add_rows(
    total: RowSum,
    gradients: Sequence[RowGradient],
    *,
    implementation: str | None = None,
    piece_picks: int = dense.PIECE_PICKS,
) -> RowSum:
    """Adds row gradients of all tokens of the mesh to a sum; nothing crosses `data`."""
    settings = {"implementation": implementation, "piece_picks": piece_picks}
    if has_memory_axis():
        specs = (_ROW_SUM, (_FACTORS,) * len(gradients))
        run = over_mesh(_add_own, specs, _ROW_SUM, gather=_gather_replica, **settings)
    else:
        run = unsharded(partial(_add_own, **settings), total.gradient)
    return run(total, tuple(gradients))


@alike_over_tensor
def _add_own(total: RowSum, gradients: Sequence[RowGradient], **settings: Any) -> RowSum:
    """Adds row gradients to the sum of a device's columns."""
    gradient, touched = dense.summed(gradients, (total.gradient[0], total.touched[0, 0]), **settings)
    return RowSum(gradient[None], touched[None, None])


def _update_rows_by_sum(
    table: Array, state: TableState, total: RowSum, rule: RowRule, step: RowStep, block_bytes: int
) -> tuple[Array, TableState]:
    """`update_rows` by a sum; the sums of replicas are added up."""
    if not has_memory_axis():
        run = lambda table, state, gradient, touched, step: dense.update_touched(
            table, state, gradient, touched, rule, step, block_bytes=block_bytes
        )
        arguments = table, state, total.gradient[0], total.touched[0, 0], step
        return unsharded_update(alike_over_tensor(run), (table, state))(*arguments)
    specs = (rules.COLUMNS, rules.COLUMNS, rules.REPLICA_COLUMNS, rules.REPLICA_SHARDS, rules.REPLICATED)
    run = over_mesh(_update_by_sums, specs, (rules.COLUMNS, rules.COLUMNS), rule=rule, block_bytes=block_bytes)
    return run(table, state, *total, step)


@alike_over_tensor
def _update_by_sums(
    table: Array, state: TableState, gradient: Array, touched: Array, step: RowStep, *, rule: RowRule, block_bytes: int
) -> tuple[Array, TableState]:
    """Updates a device's columns by the sums of all replicas."""
    touched = jax.lax.psum(touched[0, 0].astype(jnp.int32), rules.DATA) > 0
    reduce, step = partial(jax.lax.psum, axis_name=rules.DATA), _of_columns(step, table)
    return dense.update_touched(table, state, gradient[0], touched, rule, step, reduce=reduce, block_bytes=block_bytes)


def _of_columns(step: RowStep, table: Array) -> RowStep:
    """The step, for a device's own columns."""
    return step._replace(first_column=step.first_column + jax.lax.axis_index(rules.MEMORY) * table.shape[1])


def mesh_sizes() -> dict[str, int]:
    """`data_axis`, the replicas of a column shard, and `memory_axis`, the devices that share a table's columns."""
    axes = jax.sharding.get_abstract_mesh().shape if has_memory_axis() else {rules.DATA: 1, rules.MEMORY: 1}
    return {"data_axis": axes[rules.DATA], "memory_axis": axes[rules.MEMORY]}


def _is_plain(tokens: Array) -> bool:
    """Whether nothing crosses devices: there is no `memory` axis, or no token."""
    return not has_memory_axis() or tokens.size == 0


def _gather_mesh(gradient: RowGradient) -> RowGradient:
    """The row gradient of a device's columns, for the tokens of the whole mesh."""
    indices, weights = (jax.lax.all_gather(picks, (rules.DATA, rules.MEMORY), tiled=True) for picks in gradient[:2])
    return RowGradient(indices, weights, jax.lax.all_gather(gradient.vectors, rules.DATA, tiled=True))


def _gather_replica(gradient: RowGradient) -> RowGradient:
    """The row gradient of a device's columns, for the tokens of its replica of the table."""
    indices, weights = (jax.lax.all_gather(picks, rules.MEMORY, tiled=True) for picks in gradient[:2])
    return gradient._replace(indices=indices, weights=weights)
