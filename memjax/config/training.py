"""Settings of the training loop, checkpoints and evaluations."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from memjax.config.section import LocalPath, PathOrAddress, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """The training loop."""

    steps: Positive[int] = 750
    """Number of optimizer steps."""
    init_from: PathOrAddress[str] | None = None
    """Folder or URL of a run; training starts from the parameters, tables and tokenizer of its latest checkpoint, and
    all shapes must match. A run that has its own checkpoint resumes from that instead. null: random parameters."""
    grad_accum_steps: Positive[int] = 1
    """Micro-batches per step."""
    remat: Literal["none", "dots", "block"] = "none"
    """What the backward pass recomputes: nothing, everything but matrix products, or whole blocks; never the
    lookups."""
    attention: Literal["auto", "cudnn", "chunked"] = "auto"
    """cudnn: the fused kernel of NVIDIA GPUs, for 16-bit types; chunked: on any device, a chunk of queries at a time;
    auto: cudnn where it runs."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: Positive[int] = 500
    """Steps between checkpoints; the last step, a signal and a new best validation loss also write one."""
    keep: Positive[int] = 2
    """Latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    verify: bool = True
    """Verify the digest of every array when it is read."""
    tables: str = "always"
    """Which checkpoints contain the tables and their optimizer state. always: all; 'every N': every N-th periodic one,
    and all that are not periodic. A checkpoint without tables is small, but training cannot resume from it."""

    def problems(self) -> Iterator[str]:
        if not re.fullmatch(r"always|every 0*[1-9]\d*", self.tables):
            yield (
                f"tables={self.tables} must be always or, as in 'every 4', every and a number from 1; there is no "
                "never: nothing could resume from such a run, not even itself"
            )

    @property
    def steps_between_tables(self) -> int:
        """Periodic checkpoints at multiples of this step contain the tables."""
        return self.every * int(self.tables.removeprefix("every ") if self.tables != "always" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Section):
    """Evaluation during and after training."""

    every: Positive[int] | None = 250
    """Steps between validations; null: only at the end."""
    batches: Positive[int] = 8
    """Batches per validation."""
    recall_people: Positive[int] = 500
    """People in the recall test at the end (source: biographies)."""
    recall_every: Positive[int] | None = None
    """Steps between recall tests during training (source: biographies), without zeroed tables; null: only at the
    end."""
    questions: LocalPath[tuple[str, ...]] = ()
    """Question sets to evaluate during training, as in `questions` of `python -m memjax.evaluate`."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks to evaluate during training, as in `tasks` of `python -m memjax.evaluate`."""
    task_folder: LocalPath[str] | None = None
    """Folder with task definitions as YAML files, which replace lm-eval's own tasks."""
    questions_every: Positive[int] = 1000
    """Steps between evaluations on questions and tasks; the last step is always evaluated."""
    question_limit: Positive[int] | None = 200
    """Maximum number of questions per set and documents per task; null: all."""

    def problems(self) -> Iterator[str]:
        if self.task_folder is not None and not self.tasks:
            yield f"task_folder={self.task_folder} is used with tasks; name some, or leave it out"
