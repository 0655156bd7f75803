"""`python -m memjax.convert`: Hugging Face models in and out, official checkpoints in, memory for a dense run.

`from-hf FOLDER --out RUN`, `to-hf RUN --out FOLDER`, `from-official FOLDER --out RUN`, `upcycle RUN --out RUN`,
`quantize RUN --out RUN`.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from memjax.config.help import Positional
from memjax.config.load import READ_RUN, RUN_FOLDER
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.section import LocalPath, Positive, Section
from memjax.errors import ConfigError
from memjax.io.ctrl_c import run_command
from memjax.runs import subcommands
from memjax.runs.settings import StepSettings, TableFormat
from memjax.runs.subcommands import Subcommand

PROG = "python -m memjax.convert"
_MOST_TOKENS = 1 << 31
"""Upper bound of max_length, exclusive."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FromHfConfig(Section):
    """The run to write, and the tokenizer if the folder has none."""

    out: LocalPath[str]
    """The folder of the run to write; new or empty."""
    tokenizer: LocalPath[str] | None = None
    """A tokenizer.json or a SentencePiece .model; null: that of the folder. byte: the 256 bytes, for a model without a
    tokenizer, which can then be used only with token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHfConfig(StepSettings):
    """The checkpoint to export, and its format."""

    out: LocalPath[str]
    """The folder to write; new or empty."""
    ema: bool = False
    """Use the moving average of the dense parameters (optim.ema_decay)."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Type of the arrays in the files; saved: as in the checkpoint."""
    max_length: Positive[int] | None = None
    """Longest input in tokens (max_position_embeddings); null: that of `like`, or data.sequence_length."""
    like: LocalPath[str] | None = None
    """The Hugging Face folder that the run's model came from; its tokenizer files, chat template and generation
    settings are copied."""
    shard_gb: Positive[float] = 5.0
    """Largest file in GB; a larger model is split over several, with an index."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.max_length is not None and self.max_length >= _MOST_TOKENS:
            yield f"max_length={self.max_length} must be below {_MOST_TOKENS}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AddedMemoryConfig(MemoryConfig):
    """The memory layers to add."""

    layers: tuple[int, ...]  # pyright: ignore[reportGeneralTypeIssues]  # keyword-only fields need no default
    """Blocks (0-based) to give a memory layer."""
    placement: Literal["replace", "parallel"] = "parallel"
    """parallel: the feed-forward layers stay, and the model's outputs are unchanged until the memory is trained;
    replace: memory layers replace them, and what they knew is lost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleConfig(StepSettings):
    """The run to write, and the memory to add to its model."""

    out: LocalPath[str]
    """The folder of the run to write; new or empty."""
    memory: AddedMemoryConfig
    seed: int = 0
    """Seed of the new parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(StepSettings):
    """The run to write, and the format of its tables."""

    out: LocalPath[str]
    """The folder of the run to write; new or empty."""
    table: TableFormat = "int8"
    """Format of the rows. int8 and float8_e4m3 take half as many bytes as bfloat16, int4 a quarter; saved keeps the
    format and writes tables as files, which table_place=host memory-maps on a CPU."""


def from_hf(folder: str, *, settings: FromHfConfig) -> None:
    """Writes a run and says how to continue from it."""
    from memjax.interop.huggingface import convert as huggingface

    model = huggingface.from_hf(folder, settings.out, tokenizer=settings.tokenizer).model
    _tell_of_run(settings.out, model)


def to_hf(run: str, *, settings: ToHfConfig) -> None:
    """Writes a Hugging Face folder and says what it contains."""
    from memjax.interop.huggingface import convert as huggingface

    has_tokenizer = huggingface.to_hf(
        run,
        settings.out,
        step=settings.checkpoint,
        ema=settings.ema,
        dtype=None if settings.dtype == "saved" else settings.dtype,
        longest=settings.max_length,
        like=settings.like,
        max_bytes=int(settings.shard_gb * 1e9),
    )
    print(f"written to {settings.out}, read back and compared: the same numbers and logits")
    if not has_tokenizer:
        print("without the tokenizer, which this format does not support; keep the run's own")


def from_official(folder: str, *, settings: FromHfConfig) -> None:
    """Writes a run and says how to continue from it."""
    from memjax.interop.official import convert as official

    _tell_of_run(settings.out, official.from_official(folder, settings.out, tokenizer=settings.tokenizer).model)


def upcycle(run: str, *, settings: UpcycleConfig) -> None:
    """Writes a run and says how to continue from it."""
    from memjax.interop.upcycle import upcycle_run
    from memjax.runs.saved import read_config

    memory = MemoryConfig(**dataclasses.asdict(settings.memory))
    try:
        upcycle_run(run, settings.out, memory, step=settings.checkpoint, seed=settings.seed)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    _tell_of_run(settings.out, read_config(settings.out).model)


def quantize(run: str, *, settings: QuantizeConfig) -> None:
    """Writes a run and says how to use it."""
    from memjax.ops.row_formats import formats
    from memjax.runs.quantize import quantize_run

    row_format = None if settings.table == "saved" else formats.find(settings.table)
    config = quantize_run(run, settings.out, row_format, step=settings.checkpoint)
    place = shlex.quote(settings.out)
    print(f"run        {settings.out}: {describe(config.model)}, tables in {settings.table}, read-only")
    print(f'ask it     python -m memjax.generate {place} --prompt "..."')
    print(f"host table python -m memjax.generate {place} --table_place host")


COMMANDS: Mapping[str, Subcommand] = {
    "from-hf": Subcommand(
        from_hf,
        FromHfConfig,
        Positional(name="HF_FOLDER", help="A downloaded model: config.json, *.safetensors and a tokenizer."),
        "Converts a Llama, Mistral, Qwen 2 or 3, SmolLM 3 or OLMo 2 in Hugging Face's format, or a model with memory "
        "written by to-hf, to a run.",
    ),
    "to-hf": Subcommand(
        to_hf,
        ToHfConfig,
        READ_RUN,
        "Writes a run's model in Hugging Face's format, reads it back and compares numbers and logits. Without memory "
        "layers it is a Llama, a Mistral or a relative, which transformers 4 and 5 load; with them, the folder "
        "contains the torch code that runs it, for transformers with trust_remote_code=True.",
    ),
    "from-official": Subcommand(
        from_official,
        FromHfConfig,
        Positional(name="FOLDER", help="consolidated.safetensors or consolidated.pth, params.json and a tokenizer."),
        "Converts a checkpoint of the paper's PyTorch code (arXiv:2412.09764) to a run. A .pth file is read without "
        "unpickling: nothing in it is run.",
    ),
    "quantize": Subcommand(
        quantize,
        QuantizeConfig,
        RUN_FOLDER,
        "Copies a run with its tables stored in fewer bytes, for inference, a block of rows at a time, so that tables "
        "of any size need little memory.",
    ),
    "upcycle": Subcommand(
        upcycle,
        UpcycleConfig,
        RUN_FOLDER,
        "Copies a dense run and adds memory layers to its model: by default beside its feed-forward layers, with "
        "the same outputs until it is trained.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion that the first word names; returns the exit code."""
    return subcommands.main(PROG, COMMANDS, argv)


def _tell_of_run(out: str, model: ModelConfig) -> None:
    # Updates as small as those of fine-tuning are rounded away in bfloat16.
    wider = " --model.param_dtype float32" if model.param_dtype == "bfloat16" else ""
    place, config = shlex.quote(out), shlex.quote(f"{out}/config.yaml")
    print(f"run        {out}: {describe(model)}")
    print(f'ask it     python -m memjax.generate {place} --prompt "..."')
    print(
        f"train it   python -m memjax.train {config} --train.init_from {place}{wider} "
        "--run.dir NEW_RUN --data.path FILE"
    )


def describe(model: ModelConfig) -> str:
    """A model's shape in a few words."""
    from memjax.memory.kinds import KINDS

    lookups = [
        f", {KINDS[kind].noun} in blocks {', '.join(map(str, section.layers))}"
        for kind, section in model.lookup_sections.items()
    ]
    return f"{model.num_layers} blocks of width {model.dim}, weights in {model.param_dtype}{''.join(lookups)}"


if __name__ == "__main__":
    run_command(main)
