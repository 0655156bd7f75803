"""Reports over question sets: the choice of questions and examples, the means, and the baselines."""

import json
import pathlib

import pytest

from memjax.errors import DataError
from memjax.evaluation import model as model_module
from memjax.evaluation.model import EvalModel
from memjax.evaluation.question_sets import report as report_module
from memjax.evaluation.question_sets.ask import Graded
from memjax.evaluation.question_sets.formats import OpenQuestion, QuestionSet
from memjax.evaluation.question_sets.report import format_question_report, question_report
from memjax.evaluation.recall import zero_tables


def question(number: int, group: str | None = None, answer: str = "none") -> OpenQuestion:
    text = f"q{number}"
    return OpenQuestion(text=text, prompt=f"{text}?", solved=f"{text}? {answer}", group=group, answers=(answer,))


def whole(*questions: OpenQuestion, path: str = "facts_test.jsonl") -> QuestionSet:
    return QuestionSet(path=pathlib.Path(path), questions=questions)


@pytest.fixture
def model(found) -> EvalModel:
    return EvalModel.of(found)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """Records (preceding text, question) of all that is asked; every second answer is right."""
    pairs = []

    def ask(model, questions, before, *, max_tokens, sampling, show):
        show(0.5)
        pairs.extend((text, one.text) for text, one in zip(before, questions, strict=True))
        return [
            Graded(("x",), {"exact_match": float(number % 2 == 0), "f1": 0.25}, number == 0)
            for number in range(len(questions))
        ]

    monkeypatch.setattr(report_module, "ask_open", ask)
    return pairs


def test_a_limit_spreads_the_questions_over_the_whole_set(model, asked):
    report = question_report(model, [whole(*map(question, range(10)))], zero_tables=False, limit=4)
    assert [text for _, text in asked] == ["q0", "q2", "q5", "q7"]
    (entry,) = report["sets"]
    assert (entry["questions"], entry["of"], entry["prompts_cut"]) == (4, 10, 1)
    assert entry["metrics"] == {"exact_match": 0.5, "f1": 0.25, "commonest_answer": 1.0}


def test_examples_are_others_of_the_same_group(model, asked):
    questions = [question(number, group="ab"[number % 2]) for number in range(6)] + [question(6, "c")]
    question_report(model, [whole(*questions)], zero_tables=False, shots=2)
    assert [before for before, _ in asked] == [
        "q2? none\n\nq4? none\n\n",
        "q3? none\n\nq5? none\n\n",
        "q0? none\n\nq4? none\n\n",
        "q1? none\n\nq5? none\n\n",
        "q0? none\n\nq2? none\n\n",
        "q1? none\n\nq3? none\n\n",
        "q0? none\n\nq1? none\n\n",  # a group with too few questions takes examples from others
    ]


def test_examples_can_come_from_another_part_of_the_set(model, asked):
    settings = {"shots": 1, "zero_tables": False}
    train, other = whole(question(50), path="facts_train.jsonl"), whole(question(60), path="trivia_train.jsonl")
    question_report(model, [whole(question(1))], examples=[other, train], **settings)
    assert asked == [("q50? none\n\n", "q1")]
    asked.clear()
    # The one example wanted is of the question's own subject.
    subjects = whole(question(50, "a"), question(51, "b"), path="facts_train.jsonl")
    question_report(model, [whole(question(1, "b"))], examples=[subjects], **settings)
    assert asked == [("q51? none\n\n", "q1")]
    with pytest.raises(DataError, match=r"facts_test.jsonl: --examples has no questions of facts, only of trivia"):
        question_report(model, [whole(question(1))], examples=[other], **settings)
    settings["shots"] = 2
    with pytest.raises(DataError, match="--shots must be at most 1: a question has no more examples"):
        question_report(model, [whole(question(1))], examples=[train], **settings)


def test_the_commonest_answer_of_each_group_is_shown(model, asked):
    answers = [("P1", "an actor"), ("P1", "Actor"), ("P1", "judge"), ("P2", "Rome")]
    questions = [question(number, *pair) for number, pair in enumerate(answers)]
    kept = []
    report = question_report(model, [whole(*questions)], zero_tables=False, keep=kept.append)
    (entry,) = report["sets"]
    assert entry["metrics"]["commonest_answer"] == 0.75
    assert entry["by_group"] == {
        "P1": {"questions": 3, "metrics": {"exact_match": 2 / 3, "f1": 0.25, "commonest_answer": 2 / 3}},
        "P2": {"questions": 1, "metrics": {"exact_match": 0.0, "f1": 0.25, "commonest_answer": 1.0}},
    }
    assert kept[1] == {
        "set": "facts_test",
        "question": "q1",
        "group": "P1",
        "expected": ("Actor",),
        "answers": ("x",),
        "exact_match": 0.0,
        "f1": 0.25,
        "commonest_answer": 1.0,
    }
    json.dumps([report, kept])


def test_the_table_has_a_line_for_each_set_and_group(model, asked, monkeypatch):
    monkeypatch.setattr(model_module, "zero_tables", lambda model, donate: zero_tables(model))
    questions = [question(number, group="P1" if number < 9 else "P2") for number in range(10)]
    text = format_question_report(question_report(model, [whole(*questions)]))
    heading, *lines = [line.split() for line in text.splitlines() if line]
    assert " ".join(heading) == "Short answers questions exact match f1 commonest answer tables zeroed"
    assert lines[0] == ["facts_test", "10", "50.0%", "25.0%", "100.0%", "50.0%"]
    assert lines[1] == ["P1", "9", "55.6%", "25.0%", "100.0%", "55.6%"]
    assert lines[2] == ["P2", "1", "0.0%", "25.0%", "100.0%", "0.0%"]
    assert "facts_test: 1 of 10 prompts did not fit into 32 tokens" in text
