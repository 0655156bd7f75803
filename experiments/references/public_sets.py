"""Checks official solutions of published problems, and metrics of answers to published questions. Needs the files."""

import gzip
import json
import lzma
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import evaluation
from checks import Check
from torchmetrics.functional.text import squad

from memjax.evaluation.question_sets import metrics
from memjax.evaluation.question_sets.formats import OpenQuestion, Problem, read_question_sets
from memjax.evaluation.question_sets.sandbox import run_program

HUMAN_EVAL, MBPP, SQUAD, ARC = (
    "code_eval/HumanEval.jsonl.gz",
    "code_eval/mbpp.jsonl",
    "squad11/dev.jsonl.xz",
    "mc_eval/arc_easy_test.jsonl.xz",
)


def public_sets(data: pathlib.Path, folder: pathlib.Path) -> Iterator[Check]:
    """All checks below, with the files of a folder."""
    yield from solutions(data)
    yield squad_answers(data)
    yield from choices(data, folder)


def solutions(data: pathlib.Path) -> Iterator[Check]:
    """Official solutions pass and are not truncated; solutions of other problems fail."""
    with gzip.open(data / HUMAN_EVAL, "rt", encoding="utf-8") as file:
        bodies = [json.loads(line)["canonical_solution"] for line in file]
    yield from _judged("HumanEval", _problems(data / HUMAN_EVAL), bodies)
    codes = [json.loads(line)["code"] for line in (data / MBPP).read_text(encoding="utf-8").splitlines()]
    every_third = slice(0, None, 3)
    bodies = [code.replace("\r\n", "\n") for code in codes]
    yield from _judged("MBPP", _problems(data / MBPP)[every_third], bodies[every_third])


def _problems(path: pathlib.Path) -> list[Problem]:
    return [one for one in read_question_sets([str(path)], field="questions")[0].questions if isinstance(one, Problem)]


def _judged(name: str, problems: list[Problem], bodies: list[str]) -> Iterator[Check]:
    run = lambda problem, body: run_program(problem.beginning + body, problem.tests, functions=problem.functions).passed
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(run, problems, bodies))
        # The solution of the previous problem.
        wrong = list(pool.map(run, problems[:40], bodies[-1:] + bodies[:39]))
    cut = sum(stop in body for problem, body in zip(problems, bodies, strict=True) for stop in problem.stop)
    for measure, figure in (
        (f"official solutions of {len(problems)} that fail", len(right) - sum(right)),
        (f"official solutions of {len(problems)} that a stop string cuts", cut),
        (f"wrong programs of {len(wrong)} that pass", sum(wrong)),
    ):
        yield Check("public sets", name, "its own tests", measure, float(figure), 0.0)


def squad_answers(data: pathlib.Path) -> Check:
    """Grades answers to SQuAD's questions: correct ones with small changes, and those of other questions."""
    sets = read_question_sets([str(data / SQUAD)], field="questions")
    questions = [one for one in sets[0].questions if isinstance(one, OpenQuestion)][::4]
    changes = (str.upper, lambda text: f"The {text}.", lambda text: text.replace(" ", "-"), lambda text: f"in {text}")
    differ = 0
    for number, question in enumerate(questions):
        answer = questions[number - 1].answers[0] if number % 5 == 4 else changes[number % 5](question.answers[-1])
        wanted = squad(
            {"prediction_text": answer, "id": "0"},
            {"answers": {"answer_start": [0] * len(question.answers), "text": [*question.answers]}, "id": "0"},
        )
        found = {"exact_match": metrics.exact_match, "f1": metrics.f1}
        differ += any(
            abs(100 * metrics.best(measure, answer, question.answers) - wanted[name]) > 1e-4
            for name, measure in found.items()
        )
    measure = f"of {len(questions):,} answers, those with another exact match or F1"
    return Check("public sets", "SQuAD 1.1", "torchmetrics", measure, float(differ), 0.0)


def choices(data: pathlib.Path, folder: pathlib.Path) -> Iterator[Check]:
    """Evaluates 40 questions of ARC as an lm-eval task."""
    found = evaluation.random_run(folder)
    with lzma.open(data / ARC, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:400:10]
    evaluation.write_task(folder, "arc", rows)
    for shots in (0, 2):
        figure = evaluation.accuracies_differ("arc", evaluation.both(found, folder, 8, 512), folder, shots)
        what = f"ARC, {len(rows)} questions, {shots} shots"
        yield Check("public sets", what, "lm-eval's hf", "acc and acc_norm", figure, 0.0)
