"""`python -m memjax.learn RUN FACTS --out PATCH`: writes facts into a few rows of a model's tables, as a patch."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from memjax.config.help import Positional
from memjax.config.load import parse
from memjax.config.section import LocalPath, NotNegative, Positive
from memjax.errors import ConfigError, DataError
from memjax.io.command import check_output, exit_code
from memjax.io.ctrl_c import run_command
from memjax.runs.settings import CheckpointSettings, loaded

PROG = "python -m memjax.learn"
_RUN_AND_FACTS = Positional(
    name="RUN FACTS",
    help="The folder of a run, then files of facts: JSON lines with text, or with prompt and answer, and optionally a "
    "list of paraphrases (of the text or of the prompt). A patch written by learn may be given instead of the file "
    "that it was made from.",
    repeats=True,
)
_MARGIN = 0.5
"""Nats: tokens that are likelier than all others by more are known, and their gradients would only cost old facts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnConfig(CheckpointSettings):
    """Hyperparameters, and what is measured."""

    out: LocalPath[str]
    """The patch to write: a file (.safetensors), or a folder for it. The run itself is unchanged."""
    rows: Positive[int] = 4_096
    """Rows per table that a batch of facts may change: those that it reads more than other texts do. More rows learn
    faster; fewer leave more of the model unchanged."""
    lr: Positive[float] = 0.05
    """Initial learning rate, which decays linearly to zero. sgd needs one a few hundred times higher."""
    optimizer: Literal["rowwise_adam", "sgd"] = "rowwise_adam"
    """Optimizer of the rows."""
    epochs: Positive[int] | None = None
    """Most passes over the facts; learning ends when every fact is known. null: 16, or if the facts are few, as many as
    make 384 batches."""
    batch_size: Positive[int] = 16
    """Facts per batch, each in all its wordings."""
    replay: NotNegative[int] = 128
    """Background texts replayed in each batch, so that the rows keep what they held; fewer, in proportion, if there are
    fewer facts than batch_size."""
    background: LocalPath[str] | None = None
    """Other texts, whose reads of slots are compared with the facts': a file, folder or glob; null: the training
    data."""
    background_texts: Positive[int] = 20_000
    """Most background texts to read. The counts are stored with the run."""
    held_out: LocalPath[str] | None = None
    """Questions whose answers should not change: JSON lines with prompt and answer, asked before and after. null: the
    run's own questions, if it has any (generated people)."""
    held_out_questions: Positive[int] = 1_000
    """Most held-out questions to ask."""
    seed: NotNegative[int] = 0
    """Seed of the order of the facts and of the replayed texts."""


def fewest_epochs(facts: int, batch_size: int) -> int:
    """16 passes, or as many as make 384 batches, which facts in words that are new to the model need."""
    return max(16, -(-384 // -(-facts // batch_size)))


def main(argv: Sequence[str] | None = None) -> int:
    """Learns facts and prints what is known before and after; returns the exit code."""
    parsed = parse(
        LearnConfig,
        argv,
        prog=PROG,
        description="Teaches a model facts by changing a few rows of its tables (sparse memory finetuning, "
        "arXiv:2510.15103), and writes these rows as a patch.",
        positional=_RUN_AND_FACTS,
        examples=[f"{PROG} runs/quickstart facts.jsonl --out people"],
    )
    return exit_code(lambda: _learn(parsed.positionals, parsed.config), interrupted="interrupted; nothing was written")


def _learn(words: Sequence[str], settings: LearnConfig) -> None:
    if len(words) < 2:
        raise ConfigError(f"learn takes a run and at least one file of facts; given: {len(words)}")
    from memjax.knowledge.facts import Fact, check_answers, read_facts
    from memjax.knowledge.finetune import Recipe
    from memjax.knowledge.learning import LEARNED, facts_of, learn_facts
    from memjax.runs.files import owned
    from memjax.runs.patches.patch import is_patch, patch_file, read_patch

    run, *paths = words
    check_output(str(patch_file(settings.out)), "out", makes_folder=True)
    facts: list[Fact] = []
    for path in paths:
        facts += facts_of(path, read_patch(path)) if is_patch(path) else read_facts(path, "FACTS")
    facts = list(dict.fromkeys(facts))
    check_answers(facts)
    held_out = None if settings.held_out is None else read_facts(settings.held_out, "--held_out")
    if held_out is not None and not any(fact.question for fact in held_out):
        raise DataError(f"{settings.held_out}: held_out must hold questions, lines with prompt and answer; it has none")
    with owned(patch_file(settings.out)):
        if is_patch(settings.out) and read_patch(settings.out).notes.get(LEARNED) != [fact.fields() for fact in facts]:
            raise ConfigError(
                f"out={settings.out} holds a patch of other facts, which would be lost; name another --out"
            )
        with loaded(run, settings) as found:
            if not found.model.config.lookups:
                raise ConfigError(f"{run}: the model has no memory layers and no PEER layers: there are no rows")
            names = ("rows", "lr", "batch_size", "optimizer", "replay", "seed")
            epochs = settings.epochs or fewest_epochs(len(facts), settings.batch_size)
            recipe = Recipe(epochs=epochs, margin=_MARGIN, **{name: getattr(settings, name) for name in names})
            learn_facts(
                found,
                facts,
                held_out,
                recipe,
                out=settings.out,
                source=", ".join(paths),
                corpus=settings.background,
                corpus_texts=settings.background_texts,
                most_questions=settings.held_out_questions,
            )


if __name__ == "__main__":
    run_command(main)
