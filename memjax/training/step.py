"""One training step: gradients of the dense parameters, row gradients of the tables, both optimizers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from memjax.config.run import RunConfig
from memjax.memory.sparse_gradient import Taps, row_sparse_value_and_grad
from memjax.memory.usage import count_reads, statistics
from memjax.models.decoder import layer_name
from memjax.models.loss import summed_loss
from memjax.models.moe import RouterStatistics, Routing, router_statistics
from memjax.models.parts import Tables
from memjax.ops.precision import accumulator
from memjax.ops.row_gradient import RowGradient
from memjax.sharding import axes
from memjax.sharding.axes import DATA, MEMORY
from memjax.sharding.mesh import replicated
from memjax.training.compiler import compiler_options
from memjax.training.optimizer import global_norm, without_gradient_where_frozen
from memjax.training.program import Trainer
from memjax.training.state import TrainState

BATCH = P(None, (DATA, MEMORY))
"""Layout of a batch of shape [micro-batches, sequences, tokens]."""

Batch = dict[str, Array]
Metrics = dict[str, Array]


class _Told(NamedTuple):
    """What micro-batches tell beside their gradients; it adds up over them."""

    loss: Array
    """Of the language model, of all learned tokens."""
    by_part: list[Array]
    """Summed losses of a mixture's parts."""
    routers: dict[str, RouterStatistics]
    """Of the real tokens, by layer."""


def make_train_step(trainer: Trainer, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The step (state, batch) -> (state, metrics), compiled when it is first called, or ahead by its `lower`.

    The state is donated. Call it under `jax.set_mesh(mesh)`.

    Batches have the shape [micro-batches, sequences, tokens]. Metrics stay on the device: reading them waits.
    """
    shardings = trainer.shardings(mesh)
    return jax.jit(
        lambda state, batch: train_step(trainer, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, jax.sharding.NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, None),
        compiler_options=compiler_options(mesh.devices.flat[0].platform, mesh.size),
    )


def abstract_batch(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the step as shapes."""
    data, accumulate = config.data, config.train.accumulate
    shape = (accumulate, data.batch_size // accumulate, data.sequence_length)
    integers = ["tokens", "targets", "segments", "positions"] + (["sources"] if data.mixture else [])
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in integers}
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def train_step(trainer: Trainer, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The step itself, to be traced."""
    learned, real = batch["loss_mask"].sum(), (batch["segments"] > 0).sum()
    # A batch in which nothing is learned has the loss 0.
    told, dense, rows, whole = _accumulate(trainer, state, batch, jnp.maximum(learned, 1), jnp.maximum(real, 1))
    rows = _without_padding(trainer, rows, batch)

    # Decided before anything is written, so that the last good state is always whole. The norm, which clipping needs
    # anyway, tells of all dense gradients in one pass over them.
    norm = global_norm(dense)
    factors = [(row.weights, row.vectors) for row in _row_gradients(rows)]
    ok = state.healthy & _all_finite((told, norm, whole, factors))

    updates, opt_state = trainer.optimizer.update(dense, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    tables, table_state = _update_tables(trainer, state, rows, whole, ok)

    new_state = TrainState(
        step=state.step + ok.astype(jnp.int32),
        healthy=ok,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        tables=tables,
        table_state=table_state,
        reads=_count(state, rows, ok),
    )
    metrics = {
        "train/loss": told.loss,
        "train/grad_norm": norm,
        "train/lr": trainer.schedule(state.step),
        "train/tokens": real,
        "train/learned_tokens": learned,
        "healthy": ok,
    }
    metrics |= _part_metrics(trainer, batch, told.by_part) | _router_metrics(told.routers)
    if tables:
        metrics["train/lr_table"] = trainer.table_optimizer.schedule(state.step)
    return new_state, metrics


def make_usage_report(trainer: Trainer, mesh: jax.sharding.Mesh) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """The compiled (state) -> (state with read counters at zero, slot statistics by layer)."""

    def report(reads: dict[str, Array]) -> tuple[dict[str, Array], Metrics]:
        metrics = {}
        for name, counts in reads.items():
            fields = statistics(counts)._asdict()
            metrics |= {f"memory/{name}/{field}": value for field, value in fields.items()}
        return trainer.no_reads(), metrics

    compiled = jax.jit(report, donate_argnums=0, out_shardings=(replicated(mesh, trainer.abstract_state().reads), None))

    def report_and_reset(state: TrainState) -> tuple[TrainState, Metrics]:
        reads, metrics = compiled(state.reads)
        return dataclasses.replace(state, reads=reads), metrics

    return report_and_reset


def _accumulate(
    trainer: Trainer, state: TrainState, batch: Batch, learned: Array, real: Array
) -> tuple[_Told, Any, dict, Tables]:
    """What the micro-batches tell, dense gradient, row gradients with a leading micro-batch axis, and the tables'
    gradients in the dense modes.

    The loss is a sum over tokens, divided by the number of learned tokens of the whole batch: however the batch is cut
    into micro-batches, every token counts the same.
    """
    one = lambda micro: _gradients(trainer, state.params, state.tables, micro, learned, real)
    if batch["tokens"].shape[0] == 1:
        (told, dense, whole), rows = one(jax.tree.map(lambda array: array[0], batch))
        return told, dense, jax.tree.map(lambda array: array[None], rows), whole

    def add(total: Any, micro: Batch) -> tuple[Any, dict[str, Any]]:
        part, rows = one(micro)
        return jax.tree.map(jnp.add, total, part), rows

    shapes = jax.eval_shape(lambda batch: one(jax.tree.map(lambda array: array[0], batch))[0], batch)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (told, dense, whole), rows = jax.lax.scan(add, zero, batch)
    return told, dense, rows, whole


def _gradients(trainer: Trainer, params: Any, tables: Tables, batch: Batch, learned: Array, real: Array):
    """(what it tells, dense gradient, dense table gradient), row gradients by layer: of one micro-batch."""
    parts, remat = trainer.parts, trainer.config.train.remat
    # Padding comes last in its row, so the tokens before it never see it.
    segments = batch["segments"] if trainer.config.data.rows_hold_documents else None
    is_real = batch["segments"] > 0

    def loss_fn(params: nnx.State, taps: Taps, tables: Tables) -> tuple[Array, tuple[dict, _Told]]:
        params = without_gradient_where_frozen(trainer.config.optim, _whole_outside_blocks(params))
        model = parts.assemble(params, tables)
        places = (batch["tokens"], batch["positions"], segments)
        hidden = model.hidden(*places, taps, remat, real=is_real, training=True)
        mask = batch["loss_mask"].astype(accumulator(hidden.states.dtype))
        loss, losses = summed_loss(model, hidden.states, batch["targets"], mask / learned)
        by_part = [jnp.sum(losses * mask, where=is_of_part) for is_of_part in _parts(trainer, batch)]
        told = _Told(loss, by_part, _routers(hidden.routings, is_real, real))
        return loss + _router_loss(trainer, told.routers), (hidden.lookups, told)

    taps = parts.zero_taps(batch["tokens"].size)
    if not trainer.config.optim.table.is_dense:
        (_, told), dense, rows = row_sparse_value_and_grad(loss_fn)(params, taps, tables)
        return (told, _place_gradient(trainer, dense), {}), rows
    differentiate = lambda params_and_tables, taps: loss_fn(params_and_tables[0], taps, params_and_tables[1])
    (_, told), (dense, whole), rows = row_sparse_value_and_grad(differentiate)((params, tables), taps)
    return (told, _place_gradient(trainer, dense), whole), rows


def _routers(routings: dict[str, Routing], is_real: Array, real: Array) -> dict[str, RouterStatistics]:
    """Statistics of a micro-batch's real tokens, times their share in those of the whole batch."""
    share = is_real.sum() / real
    found = {name: router_statistics(routing, is_real.ravel()) for name, routing in routings.items()}
    return jax.tree.map(lambda value: value * share.astype(value.dtype), found)


def _router_loss(trainer: Trainer, routers: dict[str, RouterStatistics]) -> Array | float:
    """What routers add to the loss of the training."""
    experts = trainer.config.model.experts
    if experts is None:
        return 0.0
    return sum(experts.balance_weight * router.balance + experts.z_weight * router.z for router in routers.values())


def _whole_outside_blocks(params: nnx.State) -> nnx.State:
    """Embedding, norm and output matrix gathered once; blocks gather theirs when they run."""
    return nnx.State({name: part if name == "blocks" else axes.whole(part) for name, part in params.items()})


def _place_gradient(trainer: Trainer, dense: nnx.State) -> nnx.State:
    """The dense gradient where its parameters live, so that no device sums or keeps all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return dense if mesh.empty else jax.lax.with_sharding_constraint(dense, trainer.dense_shardings(mesh, dense))


def _parts(trainer: Trainer, batch: Batch) -> list[Array]:
    """Of each part of a mixture, which places of the batch are from it."""
    return [batch["sources"] == number for number in range(len(trainer.config.data.mixture))]


def _part_metrics(trainer: Trainer, batch: Batch, losses: list[Array]) -> Metrics:
    """Learned tokens and loss of each part of a mixture; not a number for a part of which the batch has nothing."""
    metrics = {}
    for part, is_of_part, loss in zip(trainer.config.data.mixture, _parts(trainer, batch), losses, strict=True):
        learned = jnp.sum(batch["loss_mask"], where=is_of_part)
        metrics[f"data/{part.name}/learned_tokens"] = learned
        metrics[f"data/{part.name}/loss"] = loss / learned
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


def _row_gradients(rows: Any) -> list[RowGradient]:
    """All row gradients in a tree; of an expert lookup those of the inputs come first."""
    return jax.tree.leaves(rows, is_leaf=lambda leaf: isinstance(leaf, RowGradient))


def _update_tables(trainer: Trainer, state: TrainState, rows: dict[str, Any], whole: Tables, ok: Array):
    """Tables and their state after the step."""
    optimizer = trainer.table_optimizer
    if optimizer.config.is_dense:
        return optimizer.update_dense(state.tables, state.table_state, whole, ok)
    gradients: dict[str, list[RowGradient]] = {name: [] for name in state.tables}
    for layer, lookup in trainer.config.model.lookups.items():
        for name, found in zip(lookup.tables(layer), _row_gradients(rows[layer_name(layer)]), strict=True):
            micro_batches = range(found.indices.shape[0])
            gradients[name] += [RowGradient(*(factor[number] for factor in found)) for number in micro_batches]
    return optimizer.update_rows(state.tables, state.table_state, gradients, state.step, ok)


def _without_padding(trainer: Trainer, rows: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Row gradients by layer without the picks of tokens that are padding: they touch no row and no state."""
    is_real = batch["segments"].reshape(batch["segments"].shape[0], -1) > 0

    def of_layer(found: Any, num_slots: int) -> Any:
        keep = lambda gradient: gradient.without_padding(is_real, num_slots)
        return jax.tree.map(keep, found, is_leaf=lambda leaf: isinstance(leaf, RowGradient))

    lookups = {layer_name(layer): lookup for layer, lookup in trainer.config.model.lookups.items()}
    return {name: of_layer(found, lookups[name].num_slots) for name, found in rows.items()}


def _count(state: TrainState, rows: dict[str, Any], ok: Array) -> dict[str, Array]:
    """Read counters with the picks of real tokens (see `_without_padding`); bad steps do not count.

    Every device counts all picks: they are fewer than the slots of a large table, whose counts would have to be added
    up over the devices.
    """
    picks = {name: _row_gradients(found)[0].indices for name, found in rows.items()}
    return {
        name: count_reads(counts, axes.everywhere(jnp.where(ok, picks[name], counts.shape[0])))
        for name, counts in state.reads.items()
    }


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
