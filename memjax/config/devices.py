"""Settings of the device mesh and of multi-process runs."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from memjax.config.checks import is_count
from memjax.config.section import NotNegative, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig(Section):
    """How devices are arranged. The batch is split over `data` and `memory`, the tables' columns over `memory`, and the
    matrices of the dense blocks and the vocabulary over `tensor`.
    """

    PLACE = "mesh"

    data: Positive[int] | None = None
    """Devices along the data axis; null: all that `memory` and `tensor` leave."""
    memory: Positive[int] = 1
    """Devices along the memory axis: each holds value_dim / memory columns of every table row."""
    tensor: Positive[int] = 1
    """Devices along the tensor axis, which process the same tokens: each holds an equal part of the attention heads,
    the feed-forward layers' hidden units and the vocabulary. Must divide model.num_heads, model.num_kv_heads,
    model.ffn_dim and model.vocab_size."""
    dense: Literal["sharded", "replicated"] = "sharded"
    """Layout of the dense parameters and their optimizer state. sharded: split over the devices and gathered block by
    block when used (FSDP); replicated: a copy on every device, which saves traffic when train.remat would gather blocks
    again."""
    row_grad_reduce: Literal["auto", "all_gather", "all_reduce"] = "auto"
    """How row gradients are reduced over the data axis. all_gather: every device receives and sorts the reads of all;
    all_reduce: each replica sums its reads into a gradient of the table's size, and these are summed; auto: whichever
    sends fewer bytes. With micro-batches, all_gather keeps all reads until the update, and all_reduce sums them as they
    are computed."""

    @property
    def devices_per_replica(self) -> int:
        """Devices per position along `data`."""
        return self.memory * self.tensor

    def data_axis(self, devices: int) -> int:
        """Devices along `data`, given the total number of devices."""
        return self.data or max(1, devices // self.devices_per_replica)

    def describe(self, data_axis: int, equals: str = " ") -> str:
        """The axes with their sizes; `tensor` only if it is used."""
        axes = [("data", data_axis), ("memory", self.memory)] + [("tensor", self.tensor)] * (self.tensor > 1)
        return " x ".join(f"{name}{equals}{size}" for name, size in axes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProcessesConfig(Section):
    """Processes that train one model together, on one or many machines, all started with the same command."""

    count: Positive[int] | None = None
    """Number of processes; null: from SLURM or MPI, else 1. 1 always trains alone."""
    index: NotNegative[int] | None = None
    """Index of this process, from 0; null: from SLURM, MPI or Kubernetes."""
    coordinator: str | None = None
    """host:port where process 0 waits for the others; null: the first machine of a SLURM job."""
    start_timeout: Positive[int] = 300
    """Seconds to wait for the other processes at the start."""
    heartbeat_timeout: Positive[int] = 30
    """Seconds without a heartbeat after which a process counts as lost and the others end."""

    def problems(self) -> Iterator[str]:
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        if not (host and is_count(port)):
            yield f"coordinator={self.coordinator} must be HOST:PORT, as in node1:12345"
        if self.index is not None and self.count is not None and self.index >= self.count:
            yield f"index={self.index} must be below count={self.count}: the first process is 0"
