"""The gradients of one step over all micro-batches: of the dense parameters, and row gradients of the tables."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from memjax.memory.read import Perturbations, Reads, row_gradients
from memjax.memory.row_optimizer import RowOptimizer
from memjax.memory.sharded import no_rows
from memjax.memory.sparse_gradient import perturbed_value_and_grad
from memjax.memory.usage import count_reads
from memjax.models.decoder import layer_name
from memjax.models.loss import summed_loss
from memjax.models.moe import RouterStatistics, Routing, router_statistics
from memjax.models.parts import Tables
from memjax.ops.precision import accumulator
from memjax.sharding import axes
from memjax.training.optimizer import without_gradient_where_frozen
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState

Batch = dict[str, Array]


class LossSums(NamedTuple):
    """Scalars summed over micro-batches, returned next to the gradients."""

    loss: Array
    """Cross-entropy of the target tokens, divided by their number in the whole batch."""
    by_part: list[Array]
    """Summed loss of each part of a mixture."""
    routers: dict[str, RouterStatistics]
    """Statistics over the tokens that are not padding, by layer."""


class Summed(NamedTuple):
    """Values summed over micro-batches."""

    aux: LossSums
    dense: nnx.State
    """Gradient of the dense parameters."""
    tables: Tables
    """Gradients of the tables in the dense modes."""
    not_finite: Array
    """Number of micro-batches in which a factor of a row gradient is not finite."""


class StepGradients(NamedTuple):
    """Gradients and reads of one micro-batch or of all."""

    summed: Summed
    rows: dict[str, Any]
    """Row gradients of a table's reads, or their `RowSum`, by table."""
    reads: dict[str, Array]
    """Slots read by one micro-batch, or for all of them the updated read counters, by layer."""


def accumulate_gradients(
    program: TrainProgram, state: TrainState, batch: Batch, num_targets: Array, num_tokens: Array
) -> tuple[StepGradients, Callable[[Array], dict[str, Array]]]:
    """The gradients of all micro-batches, and a function from whether the step is ok to the read counters after it.

    The loss is a sum over tokens divided by the number of target tokens in the whole batch, so every token counts the
    same however the batch is split into micro-batches. Row gradients are kept until the update or, if that would hold
    more bytes than a dense gradient of their table, summed after each micro-batch.
    """
    one = lambda micro: _gradients(program, state, micro, num_targets, num_tokens)
    count, first = batch["tokens"].shape[0], jax.tree.map(lambda array: array[0], batch)
    if count == 1:
        found = one(first)  # counted in place
        return found, lambda ok: _counted(state.reads, found.reads, ok)
    shapes, optimizer = jax.eval_shape(one, first), program.table_optimizer
    sums = {}
    if isinstance(optimizer, RowOptimizer):
        dense = [
            name for name, rows in shapes.rows.items() if optimizer.sums_micro_batches(state.tables[name], rows, count)
        ]
        sums = {name: no_rows(state.tables[name]) for name in dense}

    def add(total: StepGradients, micro: Batch) -> tuple[StepGradients, dict[str, Any]]:
        found = one(micro)
        summed = jax.tree.map(jnp.add, total.summed, found.summed)
        rows = {name: cast(RowOptimizer, optimizer).add(rows, found.rows[name]) for name, rows in total.rows.items()}
        reads = _counted(total.reads, found.reads, jnp.ones((), bool))
        return StepGradients(summed, rows, reads), {name: rows for name, rows in found.rows.items() if name not in sums}

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.summed)
    total, stacked = jax.lax.scan(add, StepGradients(zero, sums, state.reads), batch)
    kept = {
        name: [jax.tree.map(lambda factor, n=number: factor[n], rows) for rows in of_table for number in range(count)]
        for name, of_table in stacked.items()
    }
    counts = lambda ok: jax.tree.map(lambda new, before: jnp.where(ok, new, before), total.reads, state.reads)
    return total._replace(rows=total.rows | kept), counts


def _gradients(
    program: TrainProgram, state: TrainState, batch: Batch, num_targets: Array, num_tokens: Array
) -> StepGradients:
    """The gradients and reads of one micro-batch."""
    parts, remat = program.parts, program.config.train.remat
    # Padding is at the end of its row, so the tokens before it never see it.
    segments = batch["segments"] if program.config.data.rows_hold_documents else None
    token_mask = batch["segments"] > 0

    is_dense = program.config.optim.table.is_dense

    def loss_fn(
        trained: tuple[nnx.State, Tables], perturbations: dict[str, Perturbations]
    ) -> tuple[Array, tuple[Reads, LossSums]]:
        params, tables = trained
        params = without_gradient_where_frozen(program.config.optim, _gathered_outside_blocks(params))
        model = parts.merge(params, tables if is_dense else state.tables)
        inputs = (batch["tokens"], batch["positions"], segments)
        hidden = model.hidden(*inputs, perturbations, remat, token_mask=token_mask, training=True)
        mask = batch["loss_mask"].astype(accumulator(hidden.states.dtype))
        loss, losses = summed_loss(model, hidden.states, batch["targets"], mask / num_targets.astype(mask.dtype))
        by_part = [jnp.sum(losses * mask, where=is_of_part) for is_of_part in masks_of_parts(program, batch)]
        aux = LossSums(loss, by_part, _routers(hidden.routings, token_mask, num_tokens))
        return loss + _router_loss(program, aux.routers), (hidden.reads, aux)

    trained = state.params, state.tables if is_dense else {}
    perturbations = parts.zero_perturbations(batch["tokens"].size)
    (_, aux), (dense, dense_tables), reads, cotangents = perturbed_value_and_grad(loss_fn)(trained, perturbations)
    reads = _without_padding(program, state, reads, token_mask.ravel())
    rows = {} if is_dense else row_gradients(reads, cotangents)
    factors = [(row.weights, row.vectors) for of_table in rows.values() for row in of_table]
    not_finite = (~all_finite(factors)).astype(jnp.int32)
    if not (mesh := jax.sharding.get_abstract_mesh()).empty:
        # Sharded like its parameters, so that no device sums or keeps all of it.
        dense = jax.lax.with_sharding_constraint(dense, program.dense_shardings(mesh, dense))
    summed = Summed(aux, dense, dense_tables, not_finite)
    # A layer that reads several tables reads the same rows of each of them.
    return StepGradients(summed, rows, {layer: of_layer[0].indices for layer, of_layer in reads.items()})


def _gathered_outside_blocks(params: nnx.State) -> nnx.State:
    """Gathers embedding, norm and output matrix once; blocks gather their parameters when they run."""
    return nnx.State({name: part if name == "blocks" else axes.gathered(part) for name, part in params.items()})


def masks_of_parts(program: TrainProgram, batch: Batch) -> list[Array]:
    """For each component of a mixture, the mask of its tokens in the batch."""
    return [batch["sources"] == number for number in range(len(program.config.data.mixture))]


def _routers(routings: dict[str, Routing], token_mask: Array, num_tokens: Array) -> dict[str, RouterStatistics]:
    """Statistics of a micro-batch's tokens other than padding, weighted by their share of the whole batch's tokens."""
    share = token_mask.sum() / num_tokens
    found = {name: router_statistics(routing, token_mask.ravel()) for name, routing in routings.items()}
    return jax.tree.map(lambda value: value * share.astype(value.dtype), found)


def _router_loss(program: TrainProgram, routers: dict[str, RouterStatistics]) -> Array | float:
    """The routers' auxiliary losses."""
    experts = program.config.model.experts
    if experts is None:
        return 0.0
    return sum(
        experts.aux_loss_weight * router.balance + experts.z_loss_weight * router.z for router in routers.values()
    )


def _without_padding(program: TrainProgram, state: TrainState, reads: Reads, token_mask: Bool[Array, " t"]) -> Reads:
    """The reads without the picks of padding, which must touch no row or state.

    They are in the order of the model's lookups, in which the gradients of a table are summed.
    """
    return {
        layer: tuple(read.without_padding(token_mask, state.tables[read.table].shape[0]) for read in reads[layer])
        for layer in map(layer_name, program.config.model.lookups)
    }


def _counted(counts: dict[str, Array], reads: dict[str, Array], ok: Array) -> dict[str, Array]:
    """Adds picks other than those of padding (see `_without_padding`) to the read counters, unless the step is bad.

    Every device counts all picks: there are fewer of them than slots of a large table, whose counts would otherwise be
    summed over the devices.
    """
    return {
        layer: count_reads(before, axes.replicate(jnp.where(ok, reads[layer], before.shape[0])))
        for layer, before in counts.items()
    }


def all_finite(tree: Any) -> Array:
    """Whether no number in a tree is infinite or NaN."""
    return jnp.all(jnp.stack([jnp.ones((), bool), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]))
