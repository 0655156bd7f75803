"""`python -m memjax.evaluate RUN`: measures facts, text, questions or tasks, with and without the tables."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memjax.config.load import READ_RUN, parse
from memjax.errors import ConfigError, DataError
from memjax.evaluation.offline import forbid_downloads, require_lm_eval
from memjax.evaluation.settings import EvaluateConfig
from memjax.io.command import exit_code
from memjax.io.console import fitted
from memjax.io.ctrl_c import run_command
from memjax.io.files import check_inside, read_object, write_atomic, written_lines
from memjax.runs.settings import loaded

if TYPE_CHECKING:
    from memjax.data.sources.records import Record
    from memjax.evaluation.model import EvalModel
    from memjax.evaluation.question_sets.formats import QuestionSet
    from memjax.runs.load import LoadedModel


PROG = "python -m memjax.evaluate"
Keep = Callable[[dict[str, Any]], None]
"""Called with every question or document and its answer, as JSON values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the results and saves them in the run's `evals` folder; returns the exit code."""
    parsed = parse(
        EvaluateConfig,
        argv,
        prog=PROG,
        description="Measures what a trained model knows: exact answers to questions, bits per byte of text, or tasks.",
        positional=READ_RUN,
        examples=[
            f"{PROG} runs/quickstart",
            f"{PROG} runs/wiki_text --text held_out.jsonl",
            f"{PROG} runs/wiki_text --questions questions.jsonl --shots 5",
        ],
    )
    return exit_code(lambda: _evaluate(str(parsed.positional), parsed.config))


def _evaluate(run: str, settings: EvaluateConfig) -> None:
    # Unreadable files are refused before the model is loaded.
    sets, examples = _question_sets(settings)
    require_lm_eval("tasks", settings.tasks)
    with loaded(run, settings) as found:
        asked = dataclasses.asdict(settings)
        if found.patches:
            asked["patches"] = list(found.patches)
        name, measure = _measurement(found, settings, sets, examples)
        path = _result_path(found.folder / "evals", f"{found.step}-{name}", asked)
        answers = path.with_name(f"{path.stem}-answers.jsonl") if path and (sets or settings.tasks) else None
        with _json_lines(answers) as keep:
            report = measure(keep)
    if answers:
        print(f"\nall answers are in {answers}")
    if path:
        document = {"step": found.step, "settings": asked, **report}
        write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten to {path}")
    if failed := report.get("failed"):
        raise DataError("; ".join(failed.values()))


def _measurement(
    found: "LoadedModel", settings: EvaluateConfig, sets: list["QuestionSet"], examples: list["QuestionSet"]
) -> tuple[str, Callable[[Keep], dict[str, Any]]]:
    """The requested measurement: its name in the result's file name, and a function that runs and prints it."""
    from memjax.data.sources.kinds import find_source

    if sets:
        return f"questions-{_stem(settings.questions)}", lambda keep: _questions(found, settings, sets, examples, keep)
    if settings.tasks:
        return f"tasks-{_stem(settings.tasks)}", lambda keep: _tasks(found, settings, keep)
    if settings.text is None and find_source(found.config.data).people:
        return "facts", lambda _: _facts(found, settings)
    source = _open(found, settings)
    name = "validation" if settings.text is None else f"text-{_stem([settings.text])}"
    return name, lambda _: _text(found, settings, source)


def _result_path(folder: pathlib.Path, name: str, asked: dict[str, Any]) -> pathlib.Path | None:
    """The file for the result; None, with a message, if it cannot be written, since the results are printed anyway.

    A result measured with other settings or patches is kept: the new file's name then ends in a digest of these.
    """
    try:
        check_inside(folder, folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"the results are only printed: {folder}: {error.strerror}", file=sys.stderr)
        return None
    asked = json.loads(json.dumps(asked))
    path = folder / f"{name}.json"
    if not path.exists() or (read_object(path) or {}).get("settings") == asked:
        return path
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{name}-{digest}.json"


def _stem(asked: Sequence[str]) -> str:
    """The requested files or tasks, as part of a file name."""
    more = f"-and-{len(asked) - 1}-more" if len(asked) > 1 else ""
    name = pathlib.Path(asked[0]).resolve().name.partition(".")[0]
    # File names are limited to 255 bytes, and more is appended.
    return re.sub(r"[^\w-]+", "_", name)[:40] + more


def _question_sets(settings: EvaluateConfig) -> tuple[list["QuestionSet"], list["QuestionSet"]]:
    """The question sets to ask, and those that provide examples."""
    if not settings.questions:
        return [], []
    from memjax.evaluation.question_sets.formats import read_question_sets

    sets = read_question_sets(settings.questions, field="--questions")
    return sets, read_question_sets(settings.examples, field="--examples") if settings.examples else []


def _questions(
    found: "LoadedModel",
    settings: EvaluateConfig,
    sets: list["QuestionSet"],
    examples: list["QuestionSet"],
    keep: Keep,
) -> dict[str, Any]:
    from memjax.evaluation.question_sets.report import format_question_report, question_report
    from memjax.evaluation.question_sets.sandbox import Limits

    seconds = settings.program_seconds
    report = question_report(
        _eval_model(found, settings),
        sets,
        examples=examples,
        limit=settings.limit,
        shots=settings.shots or 0,
        max_tokens=settings.max_tokens,
        sampling=settings.sampling,
        samples=settings.samples,
        limits=Limits(cpu_seconds=seconds, seconds=3 * seconds) if settings.run_programs else None,
        zero_tables=settings.zero_tables,
        keep=keep,
    )
    print(format_question_report(report))
    return report


def _tasks(found: "LoadedModel", settings: EvaluateConfig, keep: Keep) -> dict[str, Any]:
    forbid_downloads()
    from memjax.evaluation.harness import format_task_report, task_report

    report = task_report(
        _eval_model(found, settings),
        settings.tasks,
        folder=settings.task_folder,
        limit=settings.limit,
        shots=settings.shots,
        zero_tables=settings.zero_tables,
        keep=keep,
    )
    print(format_task_report(report))
    return report


def _eval_model(found: "LoadedModel", settings: EvaluateConfig) -> "EvalModel":
    from memjax.evaluation.model import EvalModel

    return EvalModel.of(found, max_length=settings.sequence_length, batch_size=settings.batch_size)


@contextlib.contextmanager
def _json_lines(path: pathlib.Path | None) -> Iterator[Keep]:
    """Yields a function that writes objects to a file, one per line; without a file it does nothing."""
    if path is None:
        yield lambda values: None
        return
    with written_lines(path) as write:
        yield lambda values: write(json.dumps(values, ensure_ascii=False, default=str))


def _facts(found: "LoadedModel", settings: EvaluateConfig) -> dict[str, Any]:
    from memjax.evaluation.knowledge import format_knowledge_report, knowledge_report
    from memjax.evaluation.recall import fact_report, format_fact_report

    data = found.config.data
    # First, because measuring recall with zeroed tables frees the tables.
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
    print(f"{fitted(format_fact_report(report), 4)}\n\n{fitted(format_knowledge_report(known), 26)}")
    return report | {"knowledge": known}


def _text(found: "LoadedModel", settings: EvaluateConfig, source: "Iterable[Record]") -> dict[str, Any]:
    from memjax.data.sources.records import text_of
    from memjax.evaluation.perplexity import bits_per_byte
    from memjax.evaluation.recall import zero_tables

    length = settings.sequence_length or found.config.data.sequence_length
    if settings.stride is not None and settings.stride > length:
        raise ConfigError(f"stride={settings.stride} must be at most sequence_length={length}")

    def measure(model: Any) -> dict[str, Any]:
        score = bits_per_byte(
            model,
            found.tokenizer,
            map(text_of, source),
            sequence_length=length,
            batch_size=settings.batch_size,
            stride=settings.stride,
            max_bytes=settings.max_bytes,
        )
        return score._asdict()

    report = measure(found.model)
    print(f"bits per byte             {report['bits_per_byte']:.4f}", flush=True)
    if settings.zero_tables and found.model.config.lookups:
        report["zeroed"] = measure(zero_tables(found.model, donate=True))
        report["difference"] = report["zeroed"]["bits_per_byte"] - report["bits_per_byte"]
        print(f"  with the tables zeroed  {report['zeroed']['bits_per_byte']:.4f}")
        print(f"  the tables save         {report['difference']:.4f}")
    print(f"nats per token            {report['loss_per_token']:.4f}")
    print(f"read                      {report['bytes']:,} bytes, {report['tokens']:,} tokens")
    return report


def _open(found: "LoadedModel", settings: EvaluateConfig) -> "Iterable[Record]":
    """The text to read; DataError if it cannot be read, or the run has no validation data."""
    from memjax.data.dataset import open_dataset
    from memjax.data.mixture import SplitRecords
    from memjax.data.sources.kinds import find_source
    from memjax.data.sources.parsing import Keys
    from memjax.data.sources.stream import RecordFiles

    data = found.config.data
    if settings.text is not None:
        keys = Keys(settings.text_key or data.text_key, data.prompt_key, data.answer_key)
        return RecordFiles(settings.text, "--text", keys)
    source = find_source(data.in_run(str(found.folder)))
    if source.problem:  # a model converted from elsewhere
        raise DataError("the run has no text of its own; name a file with --text")
    held_out = open_dataset(source, found.tokenizer).validation
    if not held_out:
        raise DataError("the run has no validation data; name a file with --text")
    return SplitRecords(held_out)


if __name__ == "__main__":
    run_command(main)
