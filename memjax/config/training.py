"""Settings of the training loop, its checkpoints and its evaluations."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from memjax.config.section import LocalPath, PathOrAddress, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """The training loop."""

    steps: Positive[int] = 750
    """Optimizer steps of the whole run."""
    init_from: PathOrAddress[str] | None = None
    """Folder or address of a run (of its newest checkpoint) whose parameters, tables and tokenizer the training starts
    from; every shape must fit. A run that has a checkpoint of its own goes on from that. null: random parameters."""
    grad_accum_steps: Positive[int] = 1
    """Micro-batches per step."""
    remat: Literal["none", "dots", "block"] = "none"
    """Recomputed in the backward pass: nothing, all but matrix products, or whole blocks; never the lookups."""
    attention: Literal["auto", "cudnn", "chunked"] = "auto"
    """cudnn: the fused kernel of NVIDIA GPUs, for 16-bit types; chunked: anywhere, some queries at a time; auto: cudnn
    where it can run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: Positive[int] = 500
    """Steps between checkpoints; the last step, a signal and a new best validation loss always write one."""
    keep: Positive[int] = 2
    """Latest checkpoints that stay on disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    verify: bool = True
    """Compare every array with its digest when it is read."""
    tables: str = "always"
    """Which checkpoints hold the tables and their optimizer. always: all; 'every N': of those written every `every`
    steps each N-th, and all others that are written. One without tables is small, but nothing can go on from it."""

    def problems(self) -> Iterator[str]:
        """An invalid rule for tables."""
        if not re.fullmatch(r"always|every 0*[1-9]\d*", self.tables):
            yield (
                f"tables={self.tables} must be always or, as in 'every 4', every and a number from 1; there is no "
                "never: nothing could go on from such a run, not even itself"
            )

    @property
    def steps_between_tables(self) -> int:
        """Periodic checkpoints at multiples of this step hold the tables."""
        return self.every * int(self.tables.removeprefix("every ") if self.tables != "always" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Section):
    """Evaluation during and after the training."""

    every: Positive[int] | None = 250
    """Steps between validations; null validates only at the end."""
    batches: Positive[int] = 8
    """Batches of a validation."""
    recall_people: Positive[int] = 500
    """People asked about in the recall test at the end (source: biographies)."""
    recall_every: Positive[int] | None = None
    """Steps between recall tests during the training (source: biographies), without zeroed tables; null asks at the end
    only."""

    questions: LocalPath[tuple[str, ...]] = ()
    """Sets of questions to ask during the training, as `questions` of `python -m memjax.evaluate`."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval to do during the training, as `tasks` of `python -m memjax.evaluate`."""
    task_folder: LocalPath[str] | None = None
    """Folder with tasks as YAML files, which then are the only ones known."""
    questions_every: Positive[int] = 1000
    """Steps between two rounds of questions and tasks; the last step ends with one."""
    question_limit: Positive[int] | None = 200
    """The most questions of each set and documents of each task; null takes all."""

    def problems(self) -> Iterator[str | None]:
        """A folder of tasks, none of which is named."""
        if self.task_folder is not None and not self.tasks:
            yield f"task_folder={self.task_folder} is used with tasks; name some, or leave it out"
