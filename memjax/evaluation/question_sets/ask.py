"""Asks questions with short answers and grades them."""

from collections.abc import Sequence
from typing import NamedTuple

from memjax.config.sampling import SamplingConfig
from memjax.evaluation.model import EvalModel
from memjax.evaluation.question_sets import metrics as metrics_module
from memjax.evaluation.question_sets.formats import OpenQuestion
from memjax.inference.scoring import Show


class Graded(NamedTuple):
    """Answers to a question, and their metrics."""

    answers: tuple[str, ...]
    """One answer, or all samples."""
    metrics: dict[str, float]
    """Each in 0..1; the same names for all questions of a kind."""
    is_cut: bool
    """Whether the prompt did not fit and was truncated from the left."""


def ask_open(
    model: EvalModel,
    questions: Sequence[OpenQuestion],
    before: Sequence[str],
    *,
    max_tokens: int,
    sampling: SamplingConfig,
    show: Show,
) -> list[Graded]:
    """Asks questions and grades the first line of each answer by exact match and F1.

    `before` holds the text before each prompt.
    """
    prompts = [text + question.prompt for text, question in zip(before, questions, strict=True)]
    written = model.write(prompts, max_tokens=max_tokens, stop=("\n",), sampling=sampling, show=show)
    measures = {"exact_match": metrics_module.exact_match, "f1": metrics_module.f1}
    graded = []
    for question, (text, is_cut) in zip(questions, written, strict=True):
        metrics = {name: metrics_module.best(measure, text, question.answers) for name, measure in measures.items()}
        graded.append(Graded((text.strip(),), metrics, is_cut))
    return graded
