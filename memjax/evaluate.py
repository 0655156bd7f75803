"""`python -m memjax.evaluate RUN`: facts remembered and bits known, or bits per byte; beside it with tables zeroed."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memjax import command_line
from memjax.evaluation.command import CheckpointSettings, exit_code, loaded

if TYPE_CHECKING:
    from memjax.data.records import Source
    from memjax.loading import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(CheckpointSettings):
    """What to measure. A run on biographies is asked for its facts, unless a text is named; other runs read text."""

    text: str | None = None
    """A file to read, one document a line; .jsonl: one object a line. null: the facts, or the run's validation data."""
    text_key: str | None = None
    """JSONL field with a whole document; null takes the run's."""
    max_bytes: int | None = None
    """Text to read, in bytes; null reads all."""
    sequence_length: int | None = None
    """Tokens that the model sees at once; null takes the run's."""
    stride: int | None = None
    """Tokens from one window on a long document to the next; null is half a window, so that tokens have a context."""
    people: int | None = None
    """The most people to ask about, of those asked about in training and of the others; null asks about all."""
    batch_size: int = 64
    """Sequences at once."""
    zero_tables: bool = True
    """Measure again with the tables zeroed, which tells how much is in them."""

    def __post_init__(self) -> None:
        CheckpointSettings.__post_init__(self)
        counts = {
            name: getattr(self, name) for name in ("max_bytes", "sequence_length", "stride", "people", "batch_size")
        }
        problems = [
            f"{name}={value} must be positive" for name, value in counts.items() if value is not None and value < 1
        ]
        if self.memory_devices > 0 and self.batch_size % self.memory_devices:
            problems.append(f"batch_size={self.batch_size} must be a multiple of memory_devices={self.memory_devices}")
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements and keeps them in the run's `evals`; returns the exit code."""
    parsed = command_line.parse(
        EvaluateConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m memjax.evaluate",
        description="Measures what a trained model knows: exact answers to questions, or bits per byte of text.",
        positional=command_line.RUN_FOLDER,
    )
    return exit_code(lambda: _evaluate(str(parsed.positional), parsed.config))


def _evaluate(run: str, settings: EvaluateConfig) -> None:
    with loaded(run, settings) as found:
        data = found.config.data
        if settings.text is None and data.source == "biographies":
            name, report = "facts", _facts(found, settings)
        else:
            source = _open(run, found, settings)
            name = "validation" if settings.text is None else f"text-{pathlib.Path(settings.text).stem}"
            report = _text(found, settings, source)
        path = _evals_folder(run) / f"{found.step}-{name}.json"
        whole = {"step": found.step, "settings": dataclasses.asdict(settings), **report}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def _facts(found: "LoadedModel", settings: EvaluateConfig) -> dict[str, Any]:
    from memjax.evaluation.knowledge import format_knowledge_report, knowledge_report
    from memjax.evaluation.recall import fact_report, format_fact_report

    data = found.config.data
    # First, because the recall with the tables zeroed gives the tables back.
    known = knowledge_report(found.model, found.tokenizer, data, settings.people, batch_size=settings.batch_size)
    report = fact_report(
        found.model,
        found.tokenizer,
        data,
        settings.people,
        batch_size=settings.batch_size,
        zeroed=settings.zero_tables,
        donate=True,
    )
    print(f"{format_fact_report(report)}\n\n{format_knowledge_report(known)}")
    return report | {"knowledge": known}


def _text(found: "LoadedModel", settings: EvaluateConfig, source: "Source") -> dict[str, Any]:
    from memjax.evaluation.perplexity import bits_per_byte
    from memjax.evaluation.recall import zero_tables

    length = settings.sequence_length or found.config.data.sequence_length
    if settings.stride is not None and settings.stride > length:
        raise command_line.ConfigError([f"stride={settings.stride} must be at most sequence_length={length}"])

    def measure(model: Any) -> dict[str, Any]:
        score = bits_per_byte(
            model,
            found.tokenizer,
            _texts(source),
            sequence_length=length,
            batch_size=settings.batch_size,
            stride=settings.stride,
            max_bytes=settings.max_bytes,
        )
        return score._asdict()

    report = measure(found.model)
    print(f"bits per byte             {report['bits_per_byte']:.4f}", flush=True)
    if settings.zero_tables and found.model.config.memory is not None:
        report["zeroed"] = measure(zero_tables(found.model, donate=True))
        report["difference"] = report["zeroed"]["bits_per_byte"] - report["bits_per_byte"]
        print(f"  with the tables zeroed  {report['zeroed']['bits_per_byte']:.4f}")
        print(f"  the tables save         {report['difference']:.4f}")
    print(f"nats per token            {report['loss_per_token']:.4f}")
    print(f"read                      {report['bytes']:,} bytes, {report['tokens']:,} tokens")
    return report


def _open(run: str, found: "LoadedModel", settings: EvaluateConfig) -> "Source":
    """The text to read.

    Raises:
        DataError: it cannot be read, or the run has no validation data.
    """
    from memjax.data.parts import PartSource, open_parts
    from memjax.data.sources import DataError, JsonlSource, TextSource

    data = found.config.data
    if settings.text is None and data.source != "mixture" and data.path is None:  # a model from elsewhere
        raise DataError("the run has no text of its own; name a file with --text")
    if settings.text is None:
        _, parts = open_parts(data.in_run(str(_evals_folder(run).parent)), found.tokenizer)
        if not parts:
            raise DataError("the run holds no validation data out; name a file with --text")
        return PartSource(parts)
    if pathlib.Path(settings.text).suffix == ".jsonl":
        keys = (settings.text_key or data.text_key, data.prompt_key, data.answer_key)
        return JsonlSource(settings.text, *keys, field="--text")
    return TextSource(settings.text, field="--text")


def _texts(source: "Source") -> Iterator[str]:
    for index in range(len(source)):
        yield "".join(segment.text for segment in source[index])


def _evals_folder(run: str) -> pathlib.Path:
    from memjax.loading import CHECKPOINTS, checkpoint_folder

    folder = checkpoint_folder(run)
    return (folder.parent if folder.name == CHECKPOINTS else folder) / "evals"


if __name__ == "__main__":
    sys.exit(main())
