"""Sets of questions put to a model: the examples before each, the answers, and one report over all sets."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from memjax.errors import DataError
from memjax.evaluation.question_sets.ask import Examinee, Marked, ask_choices, ask_open
from memjax.evaluation.question_sets.formats import ChoiceQuestion, OpenQuestion, Problem, Question, QuestionSet
from memjax.evaluation.question_sets.metrics import normalised
from memjax.evaluation.question_sets.programs import ask_problems
from memjax.evaluation.question_sets.sandbox import Limits
from memjax.evaluation.recall import zero_tables
from memjax.evaluation.settings import EvaluateConfig
from memjax.monitoring.progress import Progress
from memjax.runs.load import LoadedModel

_ANSWER_TOKENS, _PROGRAM_TOKENS = 32, 384
_KINDS: dict[type[Question], str] = {OpenQuestion: "open", ChoiceQuestion: "choice", Problem: "program"}
_TITLES = {"open": "Short answers", "choice": "Multiple choice", "program": "Programs"}
_MOST_GROUPS = 32
"""Sets of more groups than this get no line for each ..."""
_FEWEST = 5
"""... nor sets of fewer questions for a group."""


def question_report(
    found: LoadedModel,
    sets: Sequence[QuestionSet],
    settings: EvaluateConfig,
    *,
    examples: Sequence[QuestionSet] = (),
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """How a model does on each set, as JSON values.

    `metrics` are means over the questions asked, `by_group` those of its relations or subjects, `zeroed` those of the
    model without its tables, which it has lost for good then.

    Args:
        found: the model.
        sets: what to ask.
        settings: how much, with which examples, and how.
        examples: sets that the solved questions in front come from; none: from the set itself.
        keep: is given every question with its answers, as JSON values.

    Raises:
        DataError: there are not enough examples for a set.
    """
    chosen = [_Chosen.of(one, examples, settings) for one in sets]
    who = Examinee.of(found, settings)
    every = found.config.log.progress_seconds
    entries = []
    for one in chosen:
        marked = _ask(who, one, settings, every)
        for question, mark in zip(one.questions, marked, strict=True):
            keep({"set": one.name, **_shown(question, mark), **mark.metrics})
        entries.append(
            {
                "name": one.name,
                "path": one.path,
                "kind": one.kind,
                "questions": len(one.questions),
                "of": one.size,
                "prompts_cut": sum(mark.is_cut for mark in marked),
                "metrics": _means(marked),
                "by_group": _by_group(one.questions, marked),
            }
        )
    if settings.zero_tables and found.model.config.lookups:
        who = dataclasses.replace(who, model=zero_tables(found.model, donate=True))
        for one, entry in zip(chosen, entries, strict=True):
            marked = _ask(who, one, settings, every, " with the tables zeroed")
            entry["zeroed"] = _means(marked)
            for name, group in _by_group(one.questions, marked).items():
                entry["by_group"][name]["zeroed"] = group["metrics"]
    return {**who.description(), "sets": entries}


def format_question_report(report: Mapping[str, Any]) -> str:
    """The report as a table for each kind of questions."""
    blocks = []
    for kind, title in _TITLES.items():
        entries = [entry for entry in report["sets"] if entry["kind"] == kind]
        if entries:
            blocks.append("\n".join(_table(title, entries)))
    blocks += [
        f"{entry['name']}: {entry['prompts_cut']:,} of {entry['questions']:,} prompts did not fit into "
        f"{report['sequence_length']} tokens (--sequence_length), so their begins were left out"
        for entry in report["sets"]
        if entry["prompts_cut"]
    ]
    return "\n\n".join(blocks)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """Those questions of a set that are asked, and what stands before each."""

    name: str
    path: str
    kind: str
    size: int
    """Questions of the whole set."""
    questions: tuple[Any, ...]
    before: tuple[str, ...]
    guesses: Mapping[str | None, str]
    """Of each group the commonest answer, of questions with short ones."""

    @classmethod
    def of(cls, whole: QuestionSet, examples: Sequence[QuestionSet], settings: EvaluateConfig) -> "_Chosen":
        size = len(whole.questions)
        count = min(size, settings.limit or size)
        # Evenly spread, because files are often sorted by subject.
        questions = [whole.questions[number * size // count] for number in range(count)]
        return cls(
            name=whole.name,
            path=str(whole.path),
            kind=_KINDS[type(questions[0])],
            size=size,
            questions=tuple(questions),
            before=tuple(_examples(whole, questions, examples, settings.shots or 0)),
            guesses=_commonest(whole.questions),
        )


def _examples(whole: QuestionSet, asked: Iterable[Question], sets: Sequence[QuestionSet], shots: int) -> Iterator[str]:
    """The solved questions before each one: the first ones, of the same group where it has enough, never itself."""
    sources = [one for one in sets if one.family == whole.family] if sets else [whole]
    if not sources:
        others = ", ".join(sorted({one.family for one in sets}))
        raise DataError(f"{whole.path}: --examples holds none of {whole.family}, only of {others}; name a file of it")
    by_group: dict[str | None, list[Question]] = defaultdict(list)
    every = [question for source in sources for question in source.questions]
    for question in every:
        by_group[question.group].append(question)

    def first(candidates: Iterable[Question], text: str) -> list[Question]:
        return list(itertools.islice((other for other in candidates if other.text != text), shots))

    for question in asked:
        picked = first(by_group[question.group], question.text)
        if len(picked) < shots:
            picked = first(every, question.text)
        if len(picked) < shots:
            raise DataError(f"{whole.path}: there are only {len(picked)} examples for a question; set --shots to that")
        yield "".join(f"{other.solved}\n\n" for other in picked)


def _commonest(questions: Iterable[Question]) -> dict[str | None, str]:
    seen: dict[str | None, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if isinstance(question, OpenQuestion):
            # Not a set, whose order differs between runs: of answers that are equally common the first one counts.
            seen[question.group].update(dict.fromkeys(map(normalised, question.answers), 1))
    return {group: counts.most_common(1)[0][0] for group, counts in seen.items()}


def _ask(who: Examinee, chosen: _Chosen, settings: EvaluateConfig, every_seconds: float, how: str = "") -> list[Marked]:
    questions, before = chosen.questions, chosen.before
    name = f"{chosen.name}{how}"
    with Progress(1, every_seconds) as progress:

        def show(share: float) -> None:
            progress.update(share, f"{name}  {len(questions):,} questions")

        if chosen.kind == "choice":
            return ask_choices(who, questions, before, show=show)
        if chosen.kind == "program":
            seconds = settings.program_seconds
            return ask_problems(
                who,
                questions,
                before,
                max_tokens=settings.max_tokens or _PROGRAM_TOKENS,
                samples=settings.samples,
                sampling=settings.sampling,
                limits=Limits(cpu_seconds=seconds, seconds=3 * seconds) if settings.run_programs else None,
                show=show,
            )
        tokens = settings.max_tokens or _ANSWER_TOKENS
        marked = ask_open(who, questions, before, max_tokens=tokens, sampling=settings.sampling, show=show)
    for question, mark in zip(questions, marked, strict=True):
        is_right = chosen.guesses[question.group] in map(normalised, question.answers)
        # What an answer is worth that takes no knowledge of the subject asked about.
        mark.metrics["commonest_answer"] = float(is_right)
    return marked


def _shown(question: Question, mark: Marked) -> dict[str, Any]:
    """A question with what was answered, as JSON values."""
    expected = {}
    if isinstance(question, OpenQuestion):
        expected = {"expected": question.answers}
    elif isinstance(question, ChoiceQuestion):
        expected = {"expected": [question.choices[question.answer]]}
    group = {"group": question.group} if question.group is not None else {}
    return {"question": question.text, **group, **expected, "answers": mark.answers}


def _means(marked: Sequence[Marked]) -> dict[str, float]:
    return {name: float(np.mean([mark.metrics[name] for mark in marked])) for name in marked[0].metrics}


def _by_group(questions: Iterable[Question], marked: Iterable[Marked]) -> dict[str, Any]:
    groups: dict[str, list[Marked]] = defaultdict(list)
    for question, mark in zip(questions, marked, strict=True):
        if question.group is not None:
            groups[question.group].append(mark)
    return {name: {"questions": len(members), "metrics": _means(members)} for name, members in sorted(groups.items())}


def _table(title: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    metrics = list(entries[0]["metrics"])
    zeroed = metrics[:1] if "zeroed" in entries[0] else []
    names = ["questions", *(name.replace("_", " ") for name in metrics), *("tables zeroed" for _ in zeroed)]
    widths = [max(len(name) + 3, 12) for name in names]

    def line(label: str, cells: Iterable[str]) -> str:
        return f"{label:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    def row(label: str, values: Mapping[str, Any]) -> str:
        cells = [f"{values['questions']:,}", *(f"{values['metrics'][name]:.1%}" for name in metrics)]
        cells += [f"{values['zeroed'][name]:.1%}" for name in zeroed]
        return line(label, cells)

    yield line(title, names)
    for entry in entries:
        yield row(entry["name"], entry)
        groups = len(entry["by_group"])
        if groups <= _MOST_GROUPS and groups * _FEWEST <= entry["questions"]:
            for name, group in entry["by_group"].items():
                yield row(f"  {name}", group)
