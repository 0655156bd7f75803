"""The first part of what `--dry_run` prints: parameters, arithmetic, mesh."""

from collections import Counter

from memjax.config.run import RunConfig
from memjax.models.counts import count_parameters, training_flops
from memjax.models.parts import DecoderParts
from memjax.monitoring.units import billions


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
    return "\n".join(f"{name:<27} {value}" for name, value in lines if value)
