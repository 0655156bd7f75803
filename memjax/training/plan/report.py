"""The report of `--dry_run`: parameters, arithmetic, mesh."""

from collections import Counter

from memjax.config.run import RunConfig
from memjax.models.counts import count_parameters, training_flops
from memjax.models.parts import DecoderParts
from memjax.monitoring.metrics import PEAK_FLOPS
from memjax.monitoring.units import aligned, billions, gigabytes
from memjax.training.plan.search import Fit

EXAMPLE_DEVICE, EXAMPLE_MFU = "NVIDIA H100", 0.4
"""The device, and the share of its peak, for which the duration of a run is estimated."""


def describe(config: RunConfig, parts: DecoderParts, *, data_axis: int) -> str:
    """The first part of --dry_run: parameters, arithmetic, mesh."""
    counts, devices = count_parameters(parts), data_axis * config.mesh.devices_per_replica
    tokens = config.data.batch_size * config.data.sequence_length
    flops = training_flops(parts, config.data.sequence_length, freeze_dense=config.optim.freeze_dense)
    experts = config.model.experts
    slots = Counter(table.num_slots for table in config.model.tables.values())
    sizes = ", ".join(f"{number} x {num_slots:,} slots" for num_slots, number in slots.items())
    lines = [
        ("parameters", f"{counts.total:,} = {billions(counts.total)}"),
        ("  dense", f"{counts.dense:,}"),
        (
            "  experts",
            f"{counts.experts:,} ({len(config.model.layers_of('experts'))} x {experts.num_experts} experts)"
            if experts
            else "",
        ),
        ("  without routers", billions(counts.total - counts.routers) if experts else ""),
        ("  tables", f"{counts.table:,}" + (f" ({sizes})" if sizes else "")),
        ("  active per token", f"{counts.active:,}"),
        (
            "training arithmetic",
            f"{flops.total:,} FLOPs per token, {flops.total * tokens:.3g} per step of {tokens:,} tokens",
        ),
        *((f"  {group.replace('_', ' ')}", f"{count:,}" if count else "") for group, count in vars(flops).items()),
        ("mesh", f"{config.mesh.describe(data_axis)} = {devices} devices"),
    ]
    return aligned((name, value) for name, value in lines if value)


def describe_fit(config: RunConfig, found: Fit | None, device_bytes: int, devices: int) -> str:
    """The report of `--dry_run --device_gb`: settings that fit, what they need, and how long the run would take."""
    asked = f"{devices} x {gigabytes(device_bytes)}"
    if found is None:
        return f"nothing fits on {asked}, not even one sequence at a time: try more devices, or a smaller model"
    settings = " ".join(f"--{name} {value}" for name, value in found.changes.items())
    parts = DecoderParts.of(found.config.model)
    flops = training_flops(parts, config.data.sequence_length, freeze_dense=config.optim.freeze_dense).total
    tokens = found.config.data.batch_size * config.data.sequence_length
    seconds = flops * tokens * config.train.steps / (devices * EXAMPLE_MFU * PEAK_FLOPS[EXAMPLE_DEVICE])
    batch, steps = found.config.data.batch_size, found.config.train.grad_accum_steps
    micro = f"{steps} micro-batches" if steps > 1 else "one micro-batch"
    lines = [
        (f"fits on {asked}", settings or "as it is"),
        ("  bytes per device", f"{gigabytes(found.plan.total)} at the peak of a step: {found.plan.moment}"),
        ("  batch", f"{batch:,} sequences in {micro}, {tokens:,} tokens"),
        (
            "  time",
            f"{seconds / 86400:,.1f} days for {config.train.steps:,} steps on {devices} x {EXAMPLE_DEVICE} "
            f"at {EXAMPLE_MFU:.0%} of their peak",
        ),
    ]
    if batch != config.data.batch_size:
        more = round(config.train.steps * config.data.batch_size / batch)
        kind = "smaller" if batch < config.data.batch_size else "larger"
        lines.append(("  note", f"the batch is {kind}; the same number of tokens takes --train.steps {more}"))
    return aligned(lines)
