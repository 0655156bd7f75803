"""Grades likelihoods and generated answers, by group of questions."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from memjax.evaluation.question_sets.metrics import best, exact_match, f1

Row = dict[str, Any]

IN_TEXT, NOT_IN_TEXT = "in the text", "not in the text"


def groups_of(question: Row) -> tuple[str, ...]:
    """The groups to which an open question belongs."""
    if "bin" in question:
        return (question["bin"],)
    place = IN_TEXT if question["in_text"] else NOT_IN_TEXT
    of_set = f"{question['set']}, {place}"
    return (of_set,) if question["set"] == "SQuAD" else (place, of_set)


def nats(questions: Sequence[Row], found: np.ndarray) -> dict[str, float]:
    """Mean negative log-likelihood of the answers, by group."""
    return {name: float(found[places].mean()) for name, places in _places(map(groups_of, questions)).items()}


def written(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, Row]:
    """Exact match and F1 (as for SQuAD) of the first line of each answer, by group."""
    marks = [_marks(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return {
        name: {
            "questions": len(places),
            "exact_match": fmean(marks[place][0] for place in places),
            "f1": fmean(marks[place][1] for place in places),
        }
        for name, places in _places(map(groups_of, questions)).items()
    }


def by_relation(questions: Sequence[Row], found: np.ndarray, answers: Sequence[str]) -> dict[str, Row]:
    """EntityQuestions by relation: likelihood, exact match, and that of always giving the commonest answer."""
    named = ((question["relation"],) if "relation" in question else () for question in questions)
    result = {}
    for name, places in sorted(_places(named).items()):
        some = [questions[place] for place in places]
        told = [question["target"] for question in some]
        commonest = max(dict.fromkeys(told), key=told.count)
        result[name] = {
            "questions": len(places),
            "nats": float(found[places].mean()),
            "exact_match": fmean(_marks(questions[place], answers[place])[0] for place in places),
            "commonest_answer": fmean(best(exact_match, commonest, question["answers"]) for question in some),
        }
    return result


def choices(questions: Sequence[Row], found: np.ndarray) -> dict[str, Row]:
    """Multiple-choice accuracy by set: of the most likely choice, and of the most likely one per byte."""
    marks: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    start = 0
    for question in questions:
        stop = start + len(question["choices"])
        lengths = np.array([len(f" {choice}".encode()) for choice in question["choices"]])
        right = question["answer"]
        some = found[start:stop]
        marks[question["set"]].append((some.argmin() == right, (some / lengths).argmin() == right, 1 / len(some)))
        start = stop
    names = ("accuracy", "accuracy_by_byte", "chance")
    found_by_set: dict[str, Row] = {}
    for name, of_set in marks.items():
        columns = zip(*of_set, strict=True)
        found_by_set[name] = {"questions": len(of_set)} | dict(zip(names, map(fmean, columns), strict=True))
    return found_by_set


def _marks(question: Row, answer: str) -> tuple[float, float]:
    line = answer.split("\n")[0]
    return best(exact_match, line, question["answers"]), best(f1, line, question["answers"])


def _places(groups: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """Indices of the questions of each group."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, names in enumerate(groups):
        for name in names:
            found[name].append(place)
    return found
