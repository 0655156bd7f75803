"""Every setting of a run, as frozen dataclasses. Nothing here imports JAX, so a wrong config is refused at once.

The defaults are the quick start: a small model with one memory layer that learns generated biographies on a CPU.
The model's own settings are in `memjax.model_config`; their names are here too.
Checks that need one section stand in its `__post_init__`; checks across sections stand in `RunConfig`.
A check's message begins with `field=value`, which is how the loader finds the line to point at.
"""

import dataclasses
import math
import re
from typing import Literal

from memjax.config_checks import decays, local_paths, not_empty, not_negative, positive, refuse, row_rule
from memjax.model_config import (
    BlockKind,
    DType,
    ExpertLookupConfig,
    ExpertsConfig,
    LookupKind,
    MemoryConfig,
    ModelConfig,
    ProductKeyConfig,
    RopeScalingConfig,
    TableSizes,
)

__all__ = [
    "BiographiesConfig",
    "BlockKind",
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "EvalConfig",
    "ExpertLookupConfig",
    "ExpertsConfig",
    "LogConfig",
    "LookupKind",
    "MemoryConfig",
    "MeshConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimConfig",
    "ProcessesConfig",
    "ProductKeyConfig",
    "ProfileConfig",
    "RopeScalingConfig",
    "RunConfig",
    "RunFolderConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TableOptimConfig",
    "TableSizes",
    "TokenizerConfig",
    "TrackioConfig",
    "TrainConfig",
    "WandbConfig",
    "memory_axis_problems",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["byte", "bpe", "hf", "sentencepiece", "tiktoken"] = "bpe"
    """byte: the 256 bytes and the special tokens; bpe: byte-level BPE trained on the run's own corpus; the others are
    read from a file: hf a tokenizer.json with a byte-level BPE, sentencepiece a .model, tiktoken a file of ranks."""
    path: str | None = None
    """The file (hf, sentencepiece and tiktoken); the run keeps a copy."""
    train_bytes: int = 10_000_000
    """Text of the corpus, in bytes, that a BPE is trained on (spread evenly over it)."""
    bos: str | None = None
    """The file's special token that begins a text; null: the one of a known name, or the one that ends texts."""
    eos: str | None = None
    """The file's special token that ends a text; null: the one of a known name."""
    pattern: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """How text is cut before ranks are applied, which their file does not say; Llama 3 has cl100k's (tiktoken)."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Special tokens, which get the ids after the last rank in this order (tiktoken)."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens that were added to the file's own, with the ids after its last piece (sentencepiece)."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens besides eos at which generation ends."""
    adds_bos: bool = True
    """Whether prompts begin with the begin token, in generation and evaluation; records of a training always do."""

    def __post_init__(self) -> None:
        from_file = self.kind not in ("byte", "bpe")
        refuse(
            positive(train_bytes=self.train_bytes)
            + local_paths(self, "path")
            + [
                f"{name}={value} is for a tokenizer from a file; set kind to hf, sentencepiece or tiktoken"
                for name, value in (("path", self.path), ("bos", self.bos), ("eos", self.eos))
                if value is not None and not from_file
            ]
            + [
                f"added_tokens={list(self.added_tokens)} is for kind sentencepiece, whose files lack added tokens"
                if self.added_tokens and self.kind != "sentencepiece"
                else None
            ]
            + [
                f"special_tokens={list(self.special_tokens)} must name each token once, and none may be empty"
                if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens
                else None
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BiographiesConfig:
    """Generated people with six facts each, told in several wordings and asked about in questions."""

    num_people: int = 500
    """People, each with a full name of their own."""
    form: Literal["fact", "biography"] = "fact"
    """fact: one sentence a record; biography: all six sentences of a person in an order redrawn every time."""
    held_out_fraction: float = 0.5
    """Share of the people whose questions are never asked in training (their facts are told)."""
    seed: int = 0
    """Draws the people and their facts."""

    def __post_init__(self) -> None:
        refuse(
            positive(num_people=self.num_people)
            + [
                f"held_out_fraction={self.held_out_fraction} must be in 0..1"
                if not 0 <= self.held_out_fraction <= 1
                else None
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """One part of a mixture."""

    name: str
    """What metrics call it, and the folder of its prepared data."""
    path: str
    """File, folder or glob, as in data.path."""
    source: Literal["files", "jsonl", "text"] = "files"
    """How its files are read, as in data.source."""
    weight: float = 1.0
    """Share of the tokens of the training, relative to the weights of the other parts."""

    def __post_init__(self) -> None:
        refuse(
            positive(weight=self.weight)
            + local_paths(self, "path")
            + [
                f"name={self.name} must consist of letters, digits, - and _: a folder and metrics are named after it"
                if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name)
                else None
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the model reads, and how records become batches."""

    source: Literal["biographies", "jsonl", "text", "files", "mixture"] = "biographies"
    """biographies: generated; jsonl: a JSON object a line; text: a document a line; files: as the suffix says (.jsonl
    .txt .parquet .array_record, lines also with .gz .xz .zst); mixture: the parts in `mixture`."""
    path: str | None = None
    """The training data (jsonl, text, files): a file, a folder or a glob, read in sorted order."""
    mixture: tuple[MixtureConfig, ...] = ()
    """Parts that are mixed (source: mixture), as {name, path, weight, source} each."""
    validation_path: str | None = None
    """The validation data; null holds the last validation_fraction of the records (of every part) out of training."""
    validation_fraction: float = 0.005
    """Share of the records held out when validation_path is null."""
    prepared: str | None = None
    """Folder of the tokenised data; null: `prepared` in the run's folder. Compressed files, Parquet, ArrayRecord,
    mixtures and whatever is read with malformed: skip are tokenised there before the training; see memjax.prepare."""
    malformed: Literal["strict", "skip"] = "strict"
    """strict: a record that cannot be used ends the run; skip: it is left out, counted and reported."""
    max_malformed: int = 1000
    """The most records that may be left out of a part (malformed: skip); more end the run."""
    damaged_files: Literal["strict", "skip"] = "strict"
    """strict: a file of which a part cannot be read ends the run; skip: the rest of it is used (malformed: skip)."""
    max_record_bytes: int = 64_000_000
    """The largest record; a larger one is malformed, and is never read into memory."""
    text_key: str = "text"
    """Field (JSON, Parquet) with a whole document; all its tokens are learned."""
    prompt_key: str = "prompt"
    """Field with a prompt, used in records without text_key; its tokens are read, not learned."""
    answer_key: str = "answer"
    """Field with the answer to the prompt; only its tokens are learned."""
    sequence_length: int = 64
    """Tokens the model sees at once."""
    batch_size: int = 32
    """Sequences per optimizer step, over all devices and micro-batches."""
    packing: Literal["none", "concat", "first_fit"] = "first_fit"
    """none: one record a sequence, cut and padded; concat: records end to end, unpadded; first_fit: whole records."""
    document_mask: bool = True
    """Attention and positions stay inside a record when several share a sequence."""
    shuffle: bool = True
    """Shuffle all records anew in every epoch."""
    num_workers: int = 0
    """Processes that read and tokenise; 0 uses threads of this process."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """How text becomes token ids."""
    biographies: BiographiesConfig = dataclasses.field(default_factory=BiographiesConfig)
    """The generated people (source: biographies)."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.mixture]
        refuse(
            positive(
                sequence_length=self.sequence_length,
                batch_size=self.batch_size,
                max_record_bytes=self.max_record_bytes,
            )
            + not_negative(num_workers=self.num_workers, max_malformed=self.max_malformed)
            + local_paths(self, "path", "validation_path", "prepared")
            + [
                f"source={self.source} needs the parts to mix; list them in mixture, as {{name, path, weight}} each"
                if self.source == "mixture" and not self.mixture
                else None,
                f"source={self.source} does not read mixture; set source to mixture, or remove the list"
                if self.source != "mixture" and self.mixture
                else None,
                f"path={self.path} is not read with source=mixture; make it a part of mixture"
                if self.source == "mixture" and self.path is not None
                else None,
                f"mixture={names} must give every part a name of its own" if len(set(names)) < len(names) else None,
                f"validation_fraction={self.validation_fraction} must be in 0..1 and below 1"
                if not 0 <= self.validation_fraction < 1
                else None,
            ]
        )

    @property
    def rows_hold_documents(self) -> bool:
        """Whether attention has to keep documents apart: not where each has a row of its own, or rows are one text."""
        return self.document_mask and self.packing != "none"

    def in_run(self, folder: str) -> "DataConfig":
        """The same data, with the folder of the prepared data named also where it is the run's own."""
        return self if self.prepared else dataclasses.replace(self, prepared=f"{folder}/prepared")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """A learning rate over the steps of a run."""

    lr: float
    """The highest learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the rate goes on after the warm-up."""
    warmup_steps: int | float = 0.067
    """Steps over which the rate rises from 0; a number below 1 is a share of train.steps."""
    final_fraction: float = 0.05
    """Where a cosine schedule ends, as a share of lr."""

    def __post_init__(self) -> None:
        refuse(
            not_negative(lr=self.lr, warmup_steps=self.warmup_steps)
            + [
                f"warmup_steps={self.warmup_steps} must be a whole number of steps, or a share of them below 1"
                if self.warmup_steps >= 1 and not isinstance(self.warmup_steps, int)
                else None,
                f"final_fraction={self.final_fraction} must be in 0..1" if not 0 <= self.final_fraction <= 1 else None,
            ]
        )

    def warmup_of(self, steps: int) -> int:
        """The warm-up of a run of so many steps, in steps."""
        if isinstance(self.warmup_steps, int):
            return self.warmup_steps
        return min(round(self.warmup_steps * steps), steps - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableOptimConfig(ScheduleConfig):
    """The optimizer of the value tables: only rows that were read are touched."""

    lr: float = 5e-2
    """The highest learning rate of the tables."""
    optimizer: Literal["rowwise_adam", "rowwise_adagrad", "adam", "sgd", "dense_adam", "dense_sgd"] = "rowwise_adam"
    """dense_*: plain optax on a gradient of the table's size, to compare with; it costs the whole table every step."""
    beta1: float = 0.9
    """Decay of the first moment (adam, dense_adam)."""
    beta2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    state_columns: int | None = None
    """Neighbouring columns of a row that share a second moment (rowwise_*); null: the largest power of two up to 256
    that divides value_dim."""
    moment_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of adam's moments."""
    stochastic_rounding: bool = True
    """Round bfloat16 rows up or down at random, so that small updates are not lost; other types are unaffected."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        refuse(row_rule(beta1=self.beta1, beta2=self.beta2, eps=self.eps, state_columns=self.state_columns))

    @property
    def is_dense(self) -> bool:
        """Whether the table is differentiated as a whole."""
        return self.optimizer.startswith("dense_")

    def columns_per_state(self, value_dim: int) -> int:
        """Columns of a row that share one second moment."""
        return self.state_columns or math.gcd(256, value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(ScheduleConfig):
    """AdamW for the dense parameters; `table` for the value tables."""

    lr: float = 6e-3
    """The highest learning rate of the dense parameters."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (norms, biases and tables have none)."""
    clip: float | None = 1.0
    """Largest norm of the dense gradient; null for no clipping."""
    key_lr_factor: float = 0.2
    """Learning rate of memory keys and query projections, as a share of lr; slow keys spread the reads."""
    freeze_dense: bool = False
    """Train the memory layers and their tables only; all else stays as it is, and has no optimizer state."""
    table: TableOptimConfig = dataclasses.field(default_factory=TableOptimConfig)
    """The optimizer of the value tables."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)
        refuse(
            positive(eps=self.eps, clip=self.clip)
            + not_negative(weight_decay=self.weight_decay, key_lr_factor=self.key_lr_factor)
            + decays(beta1=self.beta1, beta2=self.beta2)
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """How devices are arranged. The batch is split over both axes, the tables' columns over `memory`."""

    data: int | None = None
    """Devices along the data axis; null takes all that `memory` leaves."""
    memory: int = 1
    """Devices along the memory axis: each holds value_dim / memory columns of every table row."""
    dense: Literal["sharded", "replicated"] = "sharded"
    """The dense parameters and their optimizer: sharded, a piece on each device, gathered block by block while they are
    used; or replicated, whole on every device, which sends less where train.remat gathers blocks again."""
    row_exchange: Literal["auto", "factored", "dense"] = "auto"
    """How row gradients cross the data axis. factored: every device gets and sorts the picks of all; dense: each
    replica sums its own to a gradient of the table's size, and these are added up; auto: what takes fewer bytes."""

    def __post_init__(self) -> None:
        refuse(positive(data=self.data, memory=self.memory))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProcessesConfig:
    """Processes that train one model together, on one machine or on many. All of them are started with one command."""

    count: int | None = None
    """Their number; null asks SLURM or MPI, and is 1 without them. 1 trains alone, whatever they say."""
    index: int | None = None
    """The number of this process, from 0; null asks SLURM, MPI or Kubernetes."""
    coordinator: str | None = None
    """host:port where process 0 waits for the others; null is the first machine of a SLURM job."""
    start_timeout: int = 300
    """Seconds to wait for the others at the start."""
    silence_timeout: int = 30
    """Seconds without a sign of life after which a process counts as gone, and the others end."""

    def __post_init__(self) -> None:
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        refuse(
            positive(count=self.count, start_timeout=self.start_timeout, silence_timeout=self.silence_timeout)
            + not_negative(index=self.index)
            + [
                f"coordinator={self.coordinator} must be HOST:PORT, as in node1:12345"
                if not (host and port.isdecimal())
                else None,
                f"index={self.index} must be below count={self.count}: the first process is 0"
                if self.index is not None and self.count is not None and self.index >= self.count
                else None,
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = 750
    """Optimizer steps of the whole run."""
    init_from: str | None = None
    """Folder of a run (of its newest checkpoint) whose parameters, tables and tokenizer the training starts from;
    every shape must fit. A run that has a checkpoint of its own goes on from that. null: fresh random parameters."""
    accumulate: int = 1
    """Micro-batches per step."""
    remat: Literal["none", "dots", "block"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or whole blocks; never the lookups."""
    attention: Literal["auto", "cudnn", "chunked"] = "auto"
    """cudnn: the fused kernel of NVIDIA GPUs, for 16-bit types; chunked: anywhere, some queries at a time; auto: cudnn
    where it can run."""

    def __post_init__(self) -> None:
        refuse(positive(steps=self.steps, accumulate=self.accumulate) + local_paths(self, "init_from"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 500
    """Steps between checkpoints; the last step, a signal and a new best validation loss always write one."""
    keep: int = 2
    """Latest checkpoints that stay on disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    verify: bool = True
    """Compare every array with its digest when it is read."""
    tables: str = "always"
    """Which checkpoints hold the tables and their optimizer. always: all; 'every N': of those written every `every`
    steps each N-th, and all others that are written. One without tables is small, but nothing can go on from it."""

    def __post_init__(self) -> None:
        refuse(
            positive(every=self.every, keep=self.keep)
            + [
                f"tables={self.tables} must be always or, as in 'every 4', every and a number from 1; there is no "
                "never: nothing could go on from such a run, not even itself"
                if not re.fullmatch(r"always|every 0*[1-9]\d*", self.tables)
                else None
            ]
        )

    @property
    def steps_between_tables(self) -> int:
        """Of the checkpoints written by number, those of its multiples hold the tables."""
        return self.every * int(self.tables.removeprefix("every ") if self.tables != "always" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation during and after the training."""

    every: int | None = 250
    """Steps between validations; null validates only at the end."""
    batches: int = 8
    """Batches of a validation."""
    recall_people: int = 500
    """People asked about in the recall test at the end (source: biographies)."""

    def __post_init__(self) -> None:
        refuse(positive(every=self.every, batches=self.batches, recall_people=self.recall_people))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases (pip install wandb). A resumed run goes on as the same run there."""

    project: str = "memjax"
    """The project."""
    name: str | None = None
    """The run's name; null takes that of its folder."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in the run's folder, for `wandb sync`."""

    def __post_init__(self) -> None:
        refuse(not_empty(project=self.project, name=self.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrackioConfig:
    """Trackio (pip install trackio), a local dashboard: `trackio show`."""

    project: str = "memjax"
    """The project."""
    name: str | None = None
    """The run's name; null takes that of its folder."""

    def __post_init__(self) -> None:
        refuse(not_empty(project=self.project, name=self.name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A trace of some steps, and a table of the operations that took the most time in them."""

    start: int = 10
    """The first step that is traced; the steps before it warm up."""
    steps: int = 5
    """Steps that are traced."""
    top: int = 15
    """Operations in the table."""

    def __post_init__(self) -> None:
        refuse(positive(start=self.start, steps=self.steps, top=self.top))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is printed and written while the run goes on. None of these writers can stop it."""

    progress_seconds: float = 5.0
    """Seconds between progress lines."""
    usage_every: int = 100
    """Steps over which reads of the slots are counted for one set of slot statistics."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into the run's folder."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases too; '{}' switches it on with its defaults."""
    trackio: TrackioConfig | None = None
    """Keep the metrics in Trackio too; '{}' switches it on with its defaults."""
    profile: ProfileConfig | None = None
    """Trace some steps; '{}' switches it on with its defaults."""

    def __post_init__(self) -> None:
        refuse(positive(progress_seconds=self.progress_seconds, usage_every=self.usage_every))


# Without slots, so that the settings of a command can inherit from it and from another class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token of a text is picked."""

    temperature: float = 0.0
    """0 always takes the likeliest token; 1 draws from the model's own probabilities."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; null for all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, after top_k."""
    repetition_penalty: float = 1.0
    """Divides the positive scores of tokens that the text holds already, multiplies the negative ones
    (arXiv:1909.05858)."""
    seed: int = 0
    """Of the draws; the same seed writes the same text."""

    def __post_init__(self) -> None:
        refuse(
            not_negative(temperature=self.temperature)
            + positive(top_k=self.top_k, repetition_penalty=self.repetition_penalty)
            + [f"top_p={self.top_p} must be above 0 and at most 1" if not 0 < self.top_p <= 1 else None]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunFolderConfig:
    """Where the run lives and what makes it repeatable."""

    dir: str = "runs/quickstart"
    """The run's folder; the same folder again resumes the run."""
    seed: int = 0
    """Seed of the initialisation, the data order and the stochastic rounding."""
    deterministic: bool = False
    """Ask XLA for bit-for-bit repeatable kernels on GPUs (slower)."""
    compile_cache: str | None = "auto"
    """Folder that keeps compiled programs, so that the next start does not compile them again. auto: memjax/compiled in
    the user's cache folder (at most 2 GB; MEMJAX_COMPILE_CACHE in the environment names another or says off, and is for
    evaluate and generate too); null keeps none."""

    def __post_init__(self) -> None:
        refuse(local_paths(self, "dir"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
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

    def __post_init__(self) -> None:
        problems: list[str | None] = [
            f"data.batch_size={self.data.batch_size} must be a multiple of train.accumulate={self.train.accumulate}"
            if self.data.batch_size % self.train.accumulate
            else None,
            f"data.batch_size={self.data.batch_size} must be a multiple of "
            f"train.accumulate x mesh.data x mesh.memory = "
            f"{self.train.accumulate} x {self.mesh.data} x {self.mesh.memory}"
            if self.mesh.data and self.data.batch_size % (self.train.accumulate * self.mesh.data * self.mesh.memory)
            else None,
            f"model.vocab_size={self.model.vocab_size} must be at least 259: "
            f"data.tokenizer.kind={self.data.tokenizer.kind} keeps the 256 bytes and 3 special tokens"
            if self.model.vocab_size < 259 and self.data.tokenizer.kind in ("byte", "bpe")
            else None,
        ]
        if self.optim.freeze_dense and not self.model.lookups:
            problems.append(
                "optim.freeze_dense=True leaves nothing to train without model.memory; give the model memory layers, "
                "or train the dense part"
            )
        problems += _too_many_picks(self)
        for width in sorted({table.width for table in self.model.tables.values()}):
            problems += memory_axis_problems(width, self.mesh.memory, self.optim.table)
        refuse(problems)


def _too_many_picks(config: RunConfig) -> list[str | None]:
    """Why the picks of a step cannot be sorted at once; empty when they can, or need not."""
    if config.mesh.row_exchange != "factored" or config.optim.table.is_dense:
        return []
    of_token = max((len(table.readers) * table.picks for table in config.model.tables.values()), default=0)
    picks = of_token * config.data.batch_size * config.data.sequence_length
    if picks < 2**31:
        return []
    return [
        f"mesh.row_exchange=factored cannot sort the {picks:,} rows that a step picks: 32 bits count fewer than "
        f"{2**31:,}; set mesh.row_exchange to auto or dense, or lower data.batch_size"
    ]


MIN_COLUMNS_PER_DEVICE = 64
"""Narrower shards would read table rows in pieces too short for the memory's bandwidth."""

MOST_DEVICES = 1 << 16
"""The largest memory axis that is proposed."""


def memory_axis_problems(value_dim: int, memory_axis: int, table: TableOptimConfig) -> list[str | None]:
    """Why rows of value_dim columns cannot be split over the memory axis; empty when they can."""
    if memory_axis == 1:
        columns = value_dim
    else:
        most = max(1, value_dim // MIN_COLUMNS_PER_DEVICE)
        if memory_axis > most or value_dim % memory_axis:
            legal = [axis for axis in range(1, min(most, MOST_DEVICES) + 1) if value_dim % axis == 0]
            return [
                f"mesh.memory={memory_axis} cannot split value_dim={value_dim}: each device needs a whole number "
                f"of columns, at least {MIN_COLUMNS_PER_DEVICE}; the largest that can is mesh.memory={legal[-1]}"
            ]
        columns = value_dim // memory_axis
    shared = table.columns_per_state(value_dim)
    if table.optimizer.startswith("rowwise_") and columns % shared:
        return [
            f"optim.table.state_columns={shared} must divide the {columns} columns of a device; "
            f"set optim.table.state_columns={math.gcd(256, columns)}"
        ]
    return []
