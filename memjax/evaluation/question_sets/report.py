"""Evaluation on question sets: the examples before each question, the answers, and one report on all sets."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from memjax.config.sampling import SamplingConfig
from memjax.errors import DataError
from memjax.evaluation.model import EvalModel
from memjax.evaluation.question_sets.ask import Graded, ask_open
from memjax.evaluation.question_sets.formats import OpenQuestion, Question, QuestionSet
from memjax.evaluation.question_sets.metrics import normalised
from memjax.evaluation.question_sets.programs import ask_problems
from memjax.evaluation.question_sets.sandbox import Limits
from memjax.inference.sampling import GREEDY
from memjax.io.console import format_table

_MAX_TOKENS = {"open": 32, "program": 384}
_TITLES = {"open": "Short answers", "program": "Programs"}
_MOST_GROUPS = 32
"""Groups are listed only for sets with at most this many of them ..."""
_FEWEST = 5
"""... and, on average, at least this many questions per group."""


def question_report(
    model: EvalModel,
    sets: Sequence[QuestionSet],
    *,
    examples: Sequence[QuestionSet] = (),
    limit: int | None = None,
    shots: int = 0,
    max_tokens: int | None = None,
    sampling: SamplingConfig = GREEDY,
    samples: int = 1,
    limits: Limits | None = None,
    zero_tables: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluates a model on question sets; returns the results as JSON values.

    At most `limit` questions of each set are asked, spread evenly over it, each after `shots` solved examples from
    `examples` or, without these, from the set itself. Answers have at most max_tokens (None: 32, programs 384).
    `samples` programs are generated per problem, and run within `limits` if these are given. `keep` is called with
    every question and its answers.

    `metrics` are means over the questions asked, `by_group` those of each group; with zero_tables, `zeroed` are those
    with the tables zeroed, which frees the model's own tables.

    Raises:
        DataError: there are not enough examples for a set.
    """
    asked = [(one, *_chosen(one, examples, limit, shots)) for one in sets]

    def ask(model: EvalModel, how: str = "") -> Iterator[list[Graded]]:
        for one, questions, before in asked:
            kind = questions[0].kind
            tokens = max_tokens or _MAX_TOKENS[kind]
            with model.progress(f"{one.name}{how}  {len(questions):,} questions") as show:
                options = {"max_tokens": tokens, "sampling": sampling, "show": show}
                if kind == "program":
                    yield ask_problems(model, questions, before, samples=samples, limits=limits, **options)
                else:
                    yield _with_baseline(one, questions, ask_open(model, questions, before, **options))

    entries = []
    for (one, questions, _), graded in zip(asked, ask(model), strict=True):
        for question, answer in zip(questions, graded, strict=True):
            keep({"set": one.name, **_shown(question), "answers": answer.answers, **answer.metrics})
        entries.append(_entry(one, questions, graded))
    if zero_tables and (zeroed := model.zeroed()):
        again = ask(zeroed, " with the tables zeroed")
        for (_, questions, _), entry, graded in zip(asked, entries, again, strict=True):
            entry["zeroed"] = _means(graded)
            for name, group in _by_group(questions, graded).items():
                entry["by_group"][name]["zeroed"] = group["metrics"]
    return {**model.description(), "sets": entries}


def format_question_report(report: Mapping[str, Any]) -> str:
    """The report as one table per kind of question."""
    blocks = []
    for kind, title in _TITLES.items():
        entries = [entry for entry in report["sets"] if entry["kind"] == kind]
        if entries:
            blocks.append(format_table(list(_rows(title, entries))))
    blocks += [
        f"{entry['name']}: {entry['prompts_cut']:,} of {entry['questions']:,} prompts did not fit into "
        f"{report['sequence_length']} tokens (--sequence_length), so they were truncated from the left"
        for entry in report["sets"]
        if entry["prompts_cut"]
    ]
    return "\n\n".join(blocks)


def _chosen(
    whole: QuestionSet, examples: Sequence[QuestionSet], limit: int | None, shots: int
) -> tuple[list[Any], list[str]]:
    """The questions of a set to ask, and the examples before each."""
    size = len(whole.questions)
    count = min(size, limit or size)
    # Evenly spread, because files are often sorted by subject.
    questions = [whole.questions[number * size // count] for number in range(count)]
    return questions, list(_examples(whole, questions, examples, shots))


def _examples(whole: QuestionSet, asked: Iterable[Question], sets: Sequence[QuestionSet], shots: int) -> Iterator[str]:
    """The examples before each question: the first others, of the same group if it has enough."""
    sources = [one for one in sets if one.family == whole.family] if sets else [whole]
    if not sources:
        others = ", ".join(sorted({one.family for one in sets}))
        raise DataError(
            f"{whole.path}: --examples has no questions of {whole.family}, only of {others}; name a file that has"
        )
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
            raise DataError(f"{whole.path}: --shots must be at most {len(picked)}: a question has no more examples")
        yield "".join(f"{other.solved}\n\n" for other in picked)


def _with_baseline(whole: QuestionSet, asked: Iterable[OpenQuestion], graded: Iterable[Graded]) -> list[Graded]:
    """Adds a baseline that needs no knowledge: whether the most common answer in the question's group is right."""
    seen: dict[str | None, Counter[str]] = defaultdict(Counter)
    for question in whole.questions:
        assert isinstance(question, OpenQuestion)
        # Not a set, whose order differs between runs: the first of several equally common answers wins.
        seen[question.group].update(dict.fromkeys(map(normalised, question.answers), 1))
    commonest = {group: counts.most_common(1)[0][0] for group, counts in seen.items()}
    return [
        answer._replace(
            metrics=answer.metrics
            | {"commonest_answer": float(commonest[question.group] in map(normalised, question.answers))}
        )
        for question, answer in zip(asked, graded, strict=True)
    ]


def _shown(question: Question) -> dict[str, Any]:
    """A question as JSON values."""
    group = {"group": question.group} if question.group is not None else {}
    expected = {"expected": question.answers} if isinstance(question, OpenQuestion) else {}
    return {"question": question.text, **group, **expected}


def _entry(whole: QuestionSet, asked: Sequence[Question], graded: Sequence[Graded]) -> dict[str, Any]:
    """The results of a set as JSON values."""
    return {
        "name": whole.name,
        "path": str(whole.path),
        "kind": asked[0].kind,
        "questions": len(asked),
        "of": len(whole.questions),
        "prompts_cut": sum(answer.is_cut for answer in graded),
        "metrics": _means(graded),
        "by_group": _by_group(asked, graded),
    }


def _means(graded: Sequence[Graded]) -> dict[str, float]:
    return {name: float(np.mean([answer.metrics[name] for answer in graded])) for name in graded[0].metrics}


def _by_group(questions: Iterable[Question], graded: Iterable[Graded]) -> dict[str, Any]:
    groups: dict[str, list[Graded]] = defaultdict(list)
    for question, answer in zip(questions, graded, strict=True):
        if question.group is not None:
            groups[question.group].append(answer)
    return {name: {"questions": len(members), "metrics": _means(members)} for name, members in sorted(groups.items())}


def _rows(title: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    metrics = list(entries[0]["metrics"])
    zeroed = metrics[:1] if "zeroed" in entries[0] else []
    names = ["questions", *(name.replace("_", " ") for name in metrics), *("tables zeroed" for _ in zeroed)]

    def row(label: str, values: Mapping[str, Any]) -> list[str]:
        cells = [label, f"{values['questions']:,}", *(f"{values['metrics'][name]:.1%}" for name in metrics)]
        return cells + [f"{values['zeroed'][name]:.1%}" for name in zeroed]

    yield [title, *names]
    for entry in entries:
        yield row(entry["name"], entry)
        groups = len(entry["by_group"])
        if groups <= _MOST_GROUPS and groups * _FEWEST <= entry["questions"]:
            for name, group in entry["by_group"].items():
                yield row(f"  {name}", group)
