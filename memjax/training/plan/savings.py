"""Suggests settings that need less memory, and explains out-of-memory errors."""

from collections.abc import Iterator
from typing import Any

import jax

from memjax.config.memory import ProductKeyConfig
from memjax.config.run import RunConfig
from memjax.config.section import replaced
from memjax.monitoring.units import gigabytes
from memjax.training.plan.memory import describe, plan
from memjax.training.program import TrainProgram


def savings(config: RunConfig, *, data_axis: int) -> list[tuple[str, int]]:
    """Changes of settings that save memory, and the bytes per device that they save, largest first."""
    program = TrainProgram.of(config)
    before = plan(config, data_axis=data_axis, program=program).total
    found = []
    for name, value in _changes(config, data_axis):
        try:
            changed = replaced(config, {name: value})
        except ValueError:  # does not fit the other settings
            continue
        # The shapes of the state do not depend on how a batch is split, and take long to compute.
        same = program if name.startswith(("train.", "data.")) else None
        after = plan(changed, data_axis=data_axis, program=same).total
        if after < before:
            found.append((f"--{name} {'null' if value is None else value}", before - after))
    return sorted(found, key=lambda change: -change[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory, at compile time or later."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explain_out_of_memory(config: RunConfig, *, data_axis: int, limit: int | None) -> str:
    """The message of an out-of-memory error: the plan, and the three most useful changes.

    `limit` is the memory of a device.
    """
    lines = ["out of memory" + (f": a device has {gigabytes(limit)} for JAX" if limit else ""), ""]
    lines += ["predicted " + describe(plan(config, data_axis=data_axis)), "", "what would need less:"]
    lines += [f"  {change:<36} {gigabytes(saved)} less" for change, saved in savings(config, data_axis=data_axis)[:3]]
    return "\n".join(lines)


def _changes(config: RunConfig, data_axis: int) -> Iterator[tuple[str, Any]]:
    """Settings that may need less memory, each with a value to try."""
    data, train = config.data, config.train
    devices = data_axis * config.mesh.memory
    if data.batch_size % (2 * train.grad_accum_steps * devices) == 0:
        yield "train.grad_accum_steps", 2 * train.grad_accum_steps
        yield "data.batch_size", data.batch_size // 2
    if train.remat != "block":
        yield "train.remat", "block"
    if config.model.dtype == "float32":
        yield "model.dtype", "bfloat16"
    if config.model.param_dtype == "float32":
        yield "model.param_dtype", "bfloat16"
    experts = config.model.experts
    if experts and experts.num_experts // 2 >= max(2, experts.chosen):
        yield "model.experts.num_experts", experts.num_experts // 2
    for kind, lookup in config.model.lookup_sections.items():
        if isinstance(lookup, ProductKeyConfig):
            yield f"model.{kind}.num_keys", max(lookup.top_k, round(lookup.num_keys * 0.5**0.5))
        if lookup.table_dtype == "float32":
            yield f"model.{kind}.table_dtype", "bfloat16"
    if config.model.lookups:
        if config.optim.clip_tables and not config.optim.table.is_dense:
            yield "optim.clip_tables", None
        if config.mesh.row_grad_reduce != "all_reduce" and not config.optim.table.is_dense:
            yield "mesh.row_grad_reduce", "all_reduce"
        if config.optim.table.optimizer in ("adam", "dense_adam"):
            yield "optim.table.optimizer", "rowwise_adam"
        if config.optim.table.optimizer == "adam" and config.optim.table.moment_dtype == "float32":
            yield "optim.table.moment_dtype", "bfloat16"
