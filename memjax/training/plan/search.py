"""Finds settings with which a run fits on devices: mesh, batch, micro-batches and rematerialisation.

The batch is kept if possible. What costs the least speed is tried first: few devices that share a table, the given
rematerialisation, large micro-batches.
"""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

from memjax.config.run import RunConfig
from memjax.config.section import replaced
from memjax.errors import ConfigError
from memjax.training.plan.memory import Plan, plan
from memjax.training.program import TrainProgram

USABLE = 0.92
"""Share of a device's memory that a plan may fill: JAX gets 0.95, and plans are off by a few percent."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings that fit."""

    config: RunConfig
    changes: dict[str, Any]
    """The settings that differ from the requested ones, by dotted name."""
    plan: Plan


def search(config: RunConfig, *, device_bytes: int, devices: int) -> Fit | None:
    """The first settings that fit; None if not even one sequence per device does.

    Types that are `auto` are planned as on GPUs.

    Raises:
        ConfigError: that many devices cannot form the requested mesh.
    """
    mesh, fixed = config.mesh, (config.mesh.data or 1) * config.mesh.tensor
    if devices % fixed:
        named = f"mesh.data={mesh.data} x mesh.tensor={mesh.tensor}" if mesh.data else f"mesh.tensor={mesh.tensor}"
        raise ConfigError(f"devices={devices} must be a multiple of {named}; plan for other devices, or change it")
    return _Search(config, int(USABLE * device_bytes), devices).run()


class _Search:
    def __init__(self, config: RunConfig, limit: int, devices: int):
        self.asked, self.limit = config, limit
        self.config = _as_on_gpus(config)
        # Shapes do not depend on the mesh or on how a batch is split, and take long to compute.
        self.program = TrainProgram.of(self.config)
        self.shards = devices // config.mesh.tensor
        """Number of equal parts into which the batch is split."""

    def run(self) -> Fit | None:
        """Tries batches, then meshes, each with the smallest micro-batch; then makes that as large as fits."""
        batches = list(self._batches())
        if self._with_batch(batches[-1]) is None:
            return None
        for batch in batches:
            if found := self._with_batch(batch):
                return self._largest_micro_batch(found)
        return None

    def _with_batch(self, batch: int) -> Fit | None:
        for mesh in self._meshes():
            smallest = {"data.batch_size": batch, "train.grad_accum_steps": batch // self.shards} | mesh
            for remat in dict.fromkeys([self.config.train.remat, "block"]):
                if found := self._fits(smallest | {"train.remat": remat}):
                    return found
        return None

    def _batches(self) -> Iterator[int]:
        """The batch, or the next smaller one that splits evenly, halved until there is one sequence per shard.

        A batch of fewer sequences than shards grows to one per shard.
        """
        each = max(1, self.config.data.batch_size // self.shards)
        while each:
            yield each * self.shards
            each //= 2

    def _meshes(self) -> Iterator[dict[str, Any]]:
        """The requested mesh; otherwise tables on each device alone, then shared by more and more devices."""
        mesh, lookups = self.config.mesh, self.config.model.lookups
        for memory in _divisors(self.shards) if lookups else [1]:
            data = self.shards // memory
            if mesh.data in (None, data):
                yield {"mesh.data": data, "mesh.memory": memory}

    def _largest_micro_batch(self, found: Fit) -> Fit:
        """The first number of micro-batches that fits, starting from one."""
        for steps in _divisors(found.config.data.batch_size // self.shards):
            if larger := self._fits(found.changes | {"train.grad_accum_steps": steps}):
                found = larger
                break
        return dataclasses.replace(found, changes=self._named(found.changes))

    def _fits(self, changes: dict[str, Any]) -> Fit | None:
        try:
            config = replaced(self.config, changes)
        except ValueError:  # these changes do not fit together
            return None
        made = plan(config, data_axis=changes["mesh.data"], program=self.program)
        return Fit(config, changes, made) if made.total <= self.limit else None

    def _named(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The actual changes, without those that a run derives by itself."""
        found = {name: value for name, value in changes.items() if operator.attrgetter(name)(self.asked) != value}
        if self.asked.mesh.data is None:
            found.pop("mesh.data", None)
        return found


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _as_on_gpus(config: RunConfig) -> RunConfig:
    changes: dict[str, Any] = {"model.dtype": "bfloat16"} if config.model.dtype == "auto" else {}
    for kind, lookup in config.model.lookup_sections.items():
        if lookup.table_dtype == "auto":
            changes[f"model.{kind}.table_dtype"] = "bfloat16"
    return replaced(config, changes)
