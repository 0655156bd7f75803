"""One training step: gradients of the dense parameters, row gradients of the tables, both optimizers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool

from memjax.config.run import RunConfig
from memjax.memory.read import Perturbations, Reads, row_gradients
from memjax.memory.row_optimizer import RowOptimizer
from memjax.memory.sharded import no_rows
from memjax.memory.sparse_gradient import perturbed_value_and_grad
from memjax.memory.usage import count_reads, statistics
from memjax.models.decoder import layer_name
from memjax.models.loss import summed_loss
from memjax.models.moe import RouterStatistics, Routing, router_statistics
from memjax.models.parts import Tables
from memjax.ops.precision import accumulator
from memjax.runs.layout import widened
from memjax.sharding import axes
from memjax.sharding.mesh import replicated
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training import spikes
from memjax.training.clipping import clipped
from memjax.training.compiler import compiler_options
from memjax.training.optimizer import at_step, global_norm, without_gradient_where_frozen
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState

BATCH = MICRO_BATCHES
"""Layout of a batch of shape [micro-batches, sequences, tokens]."""

Batch = dict[str, Array]
Metrics = dict[str, Array]


class _StepAux(NamedTuple):
    """Scalars summed over micro-batches, returned next to the gradients."""

    loss: Array
    """Of the language model, of all target tokens."""
    by_part: list[Array]
    """Summed losses of a mixture's parts."""
    routers: dict[str, RouterStatistics]
    """Of the tokens without padding, by layer."""


def make_train_step(program: TrainProgram, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The step (state, batch) -> (state, metrics), compiled when it is first called, or ahead by its `lower`.

    The state is donated. Call it under `jax.set_mesh(mesh)`.

    Batches have the shape [micro-batches, sequences, tokens]. Metrics stay on the device: reading them waits.
    """
    shardings = program.shardings(mesh)
    return jax.jit(
        lambda state, batch: train_step(program, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, jax.sharding.NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, None),
        compiler_options=compiler_options(mesh.devices.flat[0].platform, mesh.size),
    )


def abstract_batch(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the step as shapes."""
    data, accumulate = config.data, config.train.grad_accum_steps
    shape = (accumulate, data.batch_size // accumulate, data.sequence_length)
    integers = ["tokens", "targets", "segments", "positions"] + (["sources"] if data.mixture else [])
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in integers}
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def train_step(program: TrainProgram, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The step itself, to be traced."""
    num_targets, num_tokens = batch["loss_mask"].sum(), (batch["segments"] > 0).sum()
    # A batch without a target token has the loss 0.
    found, counts = _accumulate(program, state, batch, jnp.maximum(num_targets, 1), jnp.maximum(num_tokens, 1))
    aux, dense, dense_tables, not_finite = found.summed

    # Decided before anything is written, so that the last good state is always whole. The norm, which clipping needs
    # anyway, tells of all dense gradients in one pass over them.
    norm = global_norm(dense)
    dense, of_tables, tables, table_norm = clipped(program, state.tables, dense, dense_tables or found.rows, norm)
    ok = state.healthy & _all_finite((aux, norm, table_norm, dense_tables)) & (not_finite == 0)

    measured = {"loss": aux.loss, "grad_norm": norm}
    sigma = program.config.optim.skip_step_sigma
    spike = spikes.is_spike(state.recent, sigma, **measured) if sigma is not None else jnp.zeros((), bool)
    updated = ok & ~spike

    opt_state = at_step(state.opt_state, state.step)
    updates, new_opt_state = program.optimizer.update(dense, opt_state, state.params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(updated, n, o), new, old)
    params = keep(optax.apply_updates(state.params, updates), state.params)
    tables, table_state = _update_tables(program, state, tables, of_tables, updated)

    new_state = TrainState(
        step=state.step + ok.astype(jnp.int32),
        healthy=ok,
        params=params,
        opt_state=keep(new_opt_state, opt_state),
        tables=tables,
        table_state=table_state,
        reads=counts(ok),
        ema=_averaged(program, state, params, updated),
        recent=None if sigma is None else spikes.with_step(state.recent, state.step, spike, ok, **measured),
    )
    metrics = {
        "train/loss": aux.loss,
        "train/grad_norm": norm,
        "train/lr": program.schedule(state.step),
        "train/tokens": num_tokens,
        "train/target_tokens": num_targets,
        "healthy": ok,
    }
    metrics |= _part_metrics(program, batch, aux.by_part) | _router_metrics(aux.routers)
    if sigma is not None:
        metrics["train/skipped_steps"] = new_state.recent["skipped"]
    if table_norm is not None:
        metrics["train/grad_norm_tables"] = table_norm
    if tables:
        metrics["train/lr_table"] = jnp.asarray(program.table_optimizer.rate(state.step))
    return new_state, metrics


def make_usage_report(
    program: TrainProgram, mesh: jax.sharding.Mesh
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """The compiled (state) -> (state with read counters at zero, slot statistics by layer)."""

    def report(reads: dict[str, Array]) -> tuple[dict[str, Array], Metrics]:
        metrics = {}
        for name, counts in reads.items():
            fields = statistics(counts)._asdict()
            metrics |= {f"memory/{name}/{field}": value for field, value in fields.items()}
        return program.no_reads(), metrics

    compiled = jax.jit(report, donate_argnums=0, out_shardings=(replicated(mesh, program.abstract_state().reads), None))

    def report_and_reset(state: TrainState) -> tuple[TrainState, Metrics]:
        reads, metrics = compiled(state.reads)
        return dataclasses.replace(state, reads=reads), metrics

    return report_and_reset


class _Summed(NamedTuple):
    """What adds up over micro-batches."""

    aux: _StepAux
    dense: nnx.State
    """Gradient of the dense parameters."""
    tables: Tables
    """Gradients of the tables in the dense modes."""
    not_finite: Array
    """Micro-batches with a factor of a row gradient that is not finite."""


class _Gradients(NamedTuple):
    """Of one micro-batch, or of all."""

    summed: _Summed
    rows: dict[str, Any]
    """By table: the row gradients of its reads, or their `RowSum`."""
    reads: dict[str, Array]
    """By layer: the slots that were read, in the end the read counters with all of them."""


def _accumulate(
    program: TrainProgram, state: TrainState, batch: Batch, num_targets: Array, num_tokens: Array
) -> tuple[_Gradients, Callable[[Array], dict[str, Array]]]:
    """The gradients of all micro-batches; and the read counters after the step, when it is known whether it is ok.

    The loss is a sum over tokens, divided by the number of target tokens of the whole batch: however the batch is cut
    into micro-batches, every token counts the same. Row gradients are kept until the update, or, where that would hold
    more than a dense gradient of their table, summed as they come.
    """
    one = lambda micro: _gradients(program, state, micro, num_targets, num_tokens)
    count, first = batch["tokens"].shape[0], jax.tree.map(lambda array: array[0], batch)
    if count == 1:
        found = one(first)  # counted in place
        return found, lambda ok: _counted(state.reads, found.reads, ok)
    shapes, optimizer = jax.eval_shape(one, first), program.table_optimizer
    sums = {}
    if isinstance(optimizer, RowOptimizer):
        dense = [name for name, rows in shapes.rows.items() if optimizer.sums(state.tables[name], rows, count)]
        sums = {name: no_rows(state.tables[name]) for name in dense}

    def add(total: _Gradients, micro: Batch) -> tuple[_Gradients, dict[str, Any]]:
        found = one(micro)
        summed = jax.tree.map(jnp.add, total.summed, found.summed)
        add_rows = cast(RowOptimizer, optimizer).add
        rows = {name: add_rows(rows, found.rows[name]) for name, rows in total.rows.items()}
        reads = _counted(total.reads, found.reads, jnp.ones((), bool))
        return _Gradients(summed, rows, reads), {name: rows for name, rows in found.rows.items() if name not in sums}

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.summed)
    total, stacked = jax.lax.scan(add, _Gradients(zero, sums, state.reads), batch)
    kept = {
        name: [jax.tree.map(lambda factor, n=number: factor[n], rows) for rows in of_table for number in range(count)]
        for name, of_table in stacked.items()
    }
    counts = lambda ok: jax.tree.map(lambda new, before: jnp.where(ok, new, before), total.reads, state.reads)
    return total._replace(rows=total.rows | kept), counts


def _gradients(
    program: TrainProgram, state: TrainState, batch: Batch, num_targets: Array, num_tokens: Array
) -> _Gradients:
    """The gradients of one micro-batch."""
    parts, remat = program.parts, program.config.train.remat
    # Padding comes last in its row, so the tokens before it never see it.
    segments = batch["segments"] if program.config.data.rows_hold_documents else None
    token_mask = batch["segments"] > 0

    def loss_fn(
        params: nnx.State, perturbations: dict[str, Perturbations], tables: Tables
    ) -> tuple[Array, tuple[Reads, _StepAux]]:
        params = without_gradient_where_frozen(program.config.optim, _whole_outside_blocks(params))
        model = parts.assemble(params, tables)
        places = (batch["tokens"], batch["positions"], segments)
        hidden = model.hidden(*places, perturbations, remat, token_mask=token_mask, training=True)
        mask = batch["loss_mask"].astype(accumulator(hidden.states.dtype))
        loss, losses = summed_loss(model, hidden.states, batch["targets"], mask / num_targets)
        by_part = [jnp.sum(losses * mask, where=is_of_part) for is_of_part in _parts(program, batch)]
        aux = _StepAux(loss, by_part, _routers(hidden.routings, token_mask, num_tokens))
        return loss + _router_loss(program, aux.routers), (hidden.reads, aux)

    params, tables, of_tables = state.params, state.tables, {}
    perturbations = parts.zero_perturbations(batch["tokens"].size)
    if not program.config.optim.table.is_dense:
        (_, aux), dense, reads, cotangents = perturbed_value_and_grad(loss_fn)(params, perturbations, tables)
    else:
        of_both = lambda both, perturbations: loss_fn(both[0], perturbations, both[1])
        (_, aux), (dense, of_tables), reads, cotangents = perturbed_value_and_grad(of_both)(
            (params, tables), perturbations
        )
    reads = _without_padding(program, state, reads, token_mask.ravel())
    rows = {} if program.config.optim.table.is_dense else row_gradients(reads, cotangents)
    factors = [(row.weights, row.vectors) for of_table in rows.values() for row in of_table]
    not_finite = (~_all_finite(factors)).astype(jnp.int32)
    if not (mesh := jax.sharding.get_abstract_mesh()).empty:
        # Where its parameters live, so that no device sums or keeps all of it.
        dense = jax.lax.with_sharding_constraint(dense, program.dense_shardings(mesh, dense))
    summed = _Summed(aux, dense, of_tables, not_finite)
    # A layer that reads several tables reads the same rows of each.
    return _Gradients(summed, rows, {layer: of_layer[0].indices for layer, of_layer in reads.items()})


def _routers(routings: dict[str, Routing], token_mask: Array, num_tokens: Array) -> dict[str, RouterStatistics]:
    """Statistics of a micro-batch's tokens without padding, times their share in those of the whole batch."""
    share = token_mask.sum() / num_tokens
    found = {name: router_statistics(routing, token_mask.ravel()) for name, routing in routings.items()}
    return jax.tree.map(lambda value: value * share.astype(value.dtype), found)


def _router_loss(program: TrainProgram, routers: dict[str, RouterStatistics]) -> Array | float:
    """What routers add to the loss of the training."""
    experts = program.config.model.experts
    if experts is None:
        return 0.0
    return sum(
        experts.aux_loss_weight * router.balance + experts.z_loss_weight * router.z for router in routers.values()
    )


def _whole_outside_blocks(params: nnx.State) -> nnx.State:
    """Embedding, norm and output matrix gathered once; blocks gather theirs when they run."""
    return nnx.State({name: part if name == "blocks" else axes.gathered(part) for name, part in params.items()})


def _parts(program: TrainProgram, batch: Batch) -> list[Array]:
    """Of each part of a mixture, which places of the batch are from it."""
    return [batch["sources"] == number for number in range(len(program.config.data.mixture))]


def _part_metrics(program: TrainProgram, batch: Batch, losses: list[Array]) -> Metrics:
    """Target tokens and loss of each part of a mixture; not a number for a part of which the batch has nothing."""
    metrics = {}
    for part, is_of_part, loss in zip(program.config.data.mixture, _parts(program, batch), losses, strict=True):
        num_targets = jnp.sum(batch["loss_mask"], where=is_of_part)
        metrics[f"data/{part.name}/target_tokens"] = num_targets
        metrics[f"data/{part.name}/loss"] = loss / num_targets
    return metrics


def _router_metrics(routers: dict[str, RouterStatistics]) -> Metrics:
    """How tokens spread over the experts of each layer, and the losses that are to spread them."""
    metrics = {}
    for name, router in routers.items():
        metrics |= {
            f"moe/{name}/load_balance_loss": router.balance,
            f"moe/{name}/z_loss": router.z,
            f"moe/{name}/entropy": router.entropy,
            f"moe/{name}/most_loaded": router.load.max(),
            f"moe/{name}/least_loaded": router.load.min(),
        }
    return metrics


def _update_tables(
    program: TrainProgram, state: TrainState, tables: Tables, gradients: dict[str, Any], ok: Array
) -> tuple[Tables, dict[str, Any]]:
    """Tables and their state after the step."""
    update = lambda name, table: program.table_optimizer.update(
        name, table, state.table_state[name], gradients[name], step=state.step, ok=ok
    )
    new = {name: update(name, table) for name, table in tables.items()}
    return {name: table for name, (table, _) in new.items()}, {name: after for name, (_, after) in new.items()}


def _without_padding(program: TrainProgram, state: TrainState, reads: Reads, token_mask: Bool[Array, " t"]) -> Reads:
    """The reads without the picks of tokens that are padding: they touch no row and no state. In the order of the
    model's lookups, in which the gradients of a table are summed.
    """
    return {
        layer: tuple(read.without_padding(token_mask, state.tables[read.table].shape[0]) for read in reads[layer])
        for layer in map(layer_name, program.config.model.lookups)
    }


def _counted(counts: dict[str, Array], reads: dict[str, Array], ok: Array) -> dict[str, Array]:
    """Read counters with the picks of tokens that are no padding (see `_without_padding`); bad steps do not count.

    Every device counts all picks: they are fewer than the slots of a large table, whose counts would have to be added
    up over the devices.
    """
    return {
        layer: count_reads(before, axes.replicate(jnp.where(ok, reads[layer], before.shape[0])))
        for layer, before in counts.items()
    }


def _averaged(program: TrainProgram, state: TrainState, params: nnx.State, updated: Array) -> nnx.State | None:
    """The moving average of the dense parameters after the step. The first step's parameters replace its zeros."""
    most = program.config.optim.ema_decay
    if most is None:
        return None
    decay = jnp.minimum(most, state.step / (state.step + 9))
    share = jnp.where(updated, 1 - decay, 0)
    towards = lambda average, param: average + share.astype(average.dtype) * (param - average)
    return jax.tree.map(towards, state.ema, widened(params))


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.ones((), bool), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]))
