"""One training step: gradients, a check that they are finite, both optimizers, metrics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from memjax.config.run import RunConfig
from memjax.memory.usage import statistics
from memjax.models.moe import RouterStatistics
from memjax.models.parts import Tables
from memjax.runs.layout import widened
from memjax.sharding.mesh import replicated
from memjax.sharding.rules import MICRO_BATCHES
from memjax.training import spikes
from memjax.training.clipping import clipped
from memjax.training.compiler import compiler_options
from memjax.training.gradients import Batch, accumulate_gradients, all_finite, masks_of_parts
from memjax.training.optimizer import at_step, global_norm
from memjax.training.program import TrainProgram
from memjax.training.state import TrainState

Metrics = dict[str, Array]


def make_train_step(program: TrainProgram, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The step (state, batch) -> (state, metrics), compiled on the first call or ahead of time by its `lower`.

    The state is donated. Call it under `jax.set_mesh(mesh)`.

    Batches have the shape [micro-batches, sequences, tokens]. Metrics stay on the device; reading them waits.
    """
    shardings = program.shardings(mesh)
    return jax.jit(
        lambda state, batch: train_step(program, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, jax.sharding.NamedSharding(mesh, MICRO_BATCHES)),
        out_shardings=(shardings, None),
        compiler_options=compiler_options(mesh.devices.flat[0].platform, mesh.size),
    )


def abstract_batch(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a step's batch."""
    data, count = config.data, config.train.grad_accum_steps
    shape = (count, data.batch_size // count, data.sequence_length)
    integers = ["tokens", "targets", "segments", "positions"] + (["sources"] if data.mixture else [])
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in integers}
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def train_step(program: TrainProgram, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The step itself, which `make_train_step` compiles."""
    num_targets, num_tokens = batch["loss_mask"].sum(), (batch["segments"] > 0).sum()
    # A batch without target tokens has a loss of 0.
    at_least_one = jnp.maximum(num_targets, 1), jnp.maximum(num_tokens, 1)
    found, counts = accumulate_gradients(program, state, batch, *at_least_one)
    aux, dense, dense_tables, not_finite = found.summed

    # Decided before anything is written, so that the last good state always stays intact. The norm, which clipping
    # needs anyway, covers all dense gradients in one pass.
    norm = global_norm(dense)
    gradients = clipped(program, state.tables, dense, dense_tables or found.rows, norm)
    table_norm = gradients.table_norm
    ok = state.healthy & all_finite((aux, norm, table_norm, dense_tables)) & (not_finite == 0)

    measured = {"loss": aux.loss, "grad_norm": norm}
    sigma = program.config.optim.skip_step_sigma
    spike = spikes.is_spike(state.recent, sigma, **measured) if sigma is not None else jnp.zeros((), bool)
    updated = ok & ~spike

    opt_state = at_step(state.opt_state, state.step)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        updates, new_opt_state = program.optimizer.update(gradients.dense, opt_state, state.params)
        new_params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(updated, n, o), new, old)
    params = keep(new_params, state.params)
    tables, table_state = _update_tables(program, state, gradients.tables, gradients.of_tables, updated)

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

    compiled = jax.jit(report, donate_argnums=0, out_shardings=(replicated(mesh, program.abstract_state.reads), None))

    def report_and_reset(state: TrainState) -> tuple[TrainState, Metrics]:
        reads, metrics = compiled(state.reads)
        return dataclasses.replace(state, reads=reads), metrics

    return report_and_reset


def _part_metrics(program: TrainProgram, batch: Batch, losses: list[Array]) -> Metrics:
    """Target tokens and loss of each part of a mixture; the loss is NaN for a part that is not in the batch."""
    metrics = {}
    for part, is_of_part, loss in zip(program.config.data.mixture, masks_of_parts(program, batch), losses, strict=True):
        num_targets = jnp.sum(batch["loss_mask"], where=is_of_part)
        metrics[f"data/{part.name}/target_tokens"] = num_targets
        metrics[f"data/{part.name}/loss"] = loss / num_targets
    return metrics


def _router_metrics(routers: dict[str, RouterStatistics]) -> Metrics:
    """How evenly tokens spread over the experts of each layer, and the losses that encourage it."""
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


def _averaged(program: TrainProgram, state: TrainState, params: nnx.State, updated: Array) -> nnx.State | None:
    """The moving average of the dense parameters after the step. The first step's parameters replace its zeros."""
    most = program.config.optim.ema_decay
    if most is None:
        return None
    decay = jnp.minimum(most, state.step / (state.step + 9))
    share = jnp.where(updated, 1 - decay, 0)
    towards = lambda average, param: average + share.astype(average.dtype) * (param - average)
    return jax.tree.map(towards, state.ema, widened(params))
