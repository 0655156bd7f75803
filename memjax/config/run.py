"""The config of a run: all sections, and the rules that involve several of them."""

import dataclasses
import math
from collections.abc import Iterator

from memjax.config.data import DataConfig
from memjax.config.devices import MeshConfig, ProcessesConfig
from memjax.config.log import LogConfig
from memjax.config.model import ModelConfig
from memjax.config.optim import OptimConfig, TableOptimConfig
from memjax.config.section import LocalPath, PathOrAddress, Section
from memjax.config.training import CheckpointConfig, EvalConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunFolderConfig(Section):
    """Where the run is stored, and how reproducible it is."""

    dir: LocalPath[str] = "runs/quickstart"
    """The run's folder; starting with the same folder again resumes the run."""
    mirror: PathOrAddress[str] | None = None
    """Folder or URL (gs://, s3://, hf://) to which the run's folder is copied after each save and at the end, without
    its prepared data; `memjax.load` reads it. It must be empty, or the mirror of the same run. A failed copy prints a
    warning and is retried at the next save."""
    seed: int = 0
    """Seed of the initialisation, the data order and the stochastic rounding."""
    deterministic: bool = False
    """Make runs on GPUs bit-for-bit reproducible, with XLA's deterministic kernels and chunked attention: slower,
    especially with long rows."""
    compile_cache: LocalPath[str] | None = "auto"
    """Folder that caches compiled programs for later starts. auto: memjax/compiled in the user's cache folder, at most
    2 GB, or the folder in the environment variable MEMJAX_COMPILE_CACHE (`off` disables the cache), which all commands
    that run a model read. null: no cache."""

    def problems(self) -> Iterator[str]:
        if self.mirror and self.mirror.startswith(("http://", "https://")):
            yield f"mirror={self.mirror} cannot be written to; name a folder, or an address such as gs://bucket/run"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Section):
    """A whole run."""

    run: RunFolderConfig = dataclasses.field(default_factory=RunFolderConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def attention(self) -> str:
        """The attention implementation to use, or auto.

        With deterministic kernels, XLA (0.11) raises an error for programs with cuDNN's attention.
        """
        return "chunked" if self.run.deterministic else self.train.attention

    def problems(self) -> Iterator[str]:
        data, model, mesh, optim, micro = self.data, self.model, self.mesh, self.optim, self.train.grad_accum_steps
        if self.run.deterministic and self.train.attention == "cudnn":
            yield (
                "train.attention=cudnn is not bit-for-bit reproducible, as run.deterministic=True requires; omit one "
                "of them"
            )
        if data.batch_size % micro:
            yield f"data.batch_size={data.batch_size} must be a multiple of train.grad_accum_steps={micro}"
        if mesh.data and data.batch_size % (micro * mesh.data * mesh.memory):
            yield (
                f"data.batch_size={data.batch_size} must be a multiple of train.grad_accum_steps x mesh.data x "
                f"mesh.memory = {micro} x {mesh.data} x {mesh.memory}"
            )
        if model.vocab_size < 259 and data.tokenizer.kind in ("byte", "bpe"):
            yield (
                f"model.vocab_size={model.vocab_size} must be at least 259: data.tokenizer.kind={data.tokenizer.kind} "
                "keeps the 256 bytes and 3 special tokens"
            )
        if optim.freeze_dense and not model.lookups:
            yield (
                "optim.freeze_dense=True leaves nothing to train without model.memory; give the model memory layers, "
                "or train the dense part"
            )
        if self.eval.recall_every and data.source != "biographies":
            yield (
                f"eval.recall_every={self.eval.recall_every} needs data.source=biographies, and the source is "
                f"{data.source}; leave it out"
            )
        yield from self._too_many_picks()
        for width in sorted({table.width for table in model.tables.values()}):
            yield from _memory_axis_problems(width, mesh.memory, optim.table)
        yield from _tensor_axis_problems(model, mesh.tensor)

    def _too_many_picks(self) -> Iterator[str]:
        """The problem of a step with too many reads to sort at once."""
        if self.mesh.row_grad_reduce != "all_gather" or self.optim.table.is_dense:
            return
        of_token = max((len(table.readers) * table.picks for table in self.model.tables.values()), default=0)
        picks = of_token * self.data.batch_size * self.data.sequence_length
        if picks >= 2**31:
            yield (
                f"mesh.row_grad_reduce=all_gather cannot sort the {picks:,} reads of a step, which must be fewer than "
                f"{2**31:,} (32 bits); set mesh.row_grad_reduce to auto or all_reduce, or lower data.batch_size"
            )


def _tensor_axis_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
    """Reasons why the dense blocks cannot be split over the tensor axis."""
    sizes = {"num_heads": model.num_heads, "vocab_size": model.vocab_size}
    if model.num_kv_heads is not None:
        sizes["num_kv_heads"] = model.num_kv_heads
    if model.layers_of("dense"):
        sizes["ffn_dim"] = model.ffn_dim
    most = math.gcd(tensor, *sizes.values())
    for name, size in sizes.items():
        if size % tensor:
            yield (
                f"mesh.tensor={tensor} must divide model.{name}={size}: each device takes an equal part; set "
                f"model.{name}={-(-size // tensor) * tensor}, or mesh.tensor={most}"
            )


_MIN_COLUMNS_PER_DEVICE = 64
"""Narrower shards would read pieces of rows too short to use the memory bandwidth."""

_MOST_DEVICES = 1 << 16
"""The largest memory axis that messages suggest."""


def _memory_axis_problems(value_dim: int, memory_axis: int, table: TableOptimConfig) -> Iterator[str]:
    """Reasons why rows of value_dim columns cannot be split over the memory axis."""
    most = max(1, value_dim // _MIN_COLUMNS_PER_DEVICE)
    if memory_axis > 1 and (memory_axis > most or value_dim % memory_axis):
        legal = [axis for axis in range(1, min(most, _MOST_DEVICES) + 1) if value_dim % axis == 0]
        yield (
            f"mesh.memory={memory_axis} cannot split value_dim={value_dim}: each device needs a whole number "
            f"of columns, at least {_MIN_COLUMNS_PER_DEVICE}; the largest that can is mesh.memory={legal[-1]}"
        )
        return
    columns, shared = value_dim // memory_axis, table.columns_per_state(value_dim)
    if table.optimizer.startswith("rowwise_") and columns % shared:
        yield (
            f"optim.table.state_columns={shared} must divide the {columns} columns of a device; "
            f"set optim.table.state_columns={math.gcd(256, columns)}"
        )
