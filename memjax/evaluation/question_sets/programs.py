"""Functions that a model writes, and the share of them that is correct."""

import contextlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from memjax.config.sampling import SamplingConfig
from memjax.evaluation.model import EvalModel
from memjax.evaluation.question_sets.ask import Graded
from memjax.evaluation.question_sets.formats import Problem
from memjax.evaluation.question_sets.sandbox import Limits, missing_protection, run_program, unreadable
from memjax.inference.scoring import Show
from memjax.io.console import warn

_TRIES = (1, 10, 100)
"""The k for which pass@k is reported, if there are at least k samples."""
_WRITING = 0.9
"""Estimated share of the time spent on generation; the rest is for running the programs."""


def ask_problems(
    model: EvalModel,
    problems: Sequence[Problem],
    before: Sequence[str],
    *,
    max_tokens: int,
    samples: int,
    sampling: SamplingConfig,
    limits: Limits | None,
    show: Show,
) -> list[Graded]:
    """Generates functions for each problem and, with `limits`, runs them and computes pass@k.

    pass@k is the probability that one of k functions is correct. `before` holds the text before each prompt.
    """
    repeated = [problem for problem in problems for _ in range(samples)]
    prompts = [text + problem.prompt for problem, text in zip(problems, before, strict=True) for _ in range(samples)]
    stops = {problem.stop for problem in problems}
    assert len(stops) == 1, "a set has one kind of problem"
    written = model.write(
        prompts,
        max_tokens=max_tokens,
        stop=stops.pop(),
        sampling=sampling,
        show=lambda share: show(share * _WRITING),
    )
    passed: list[bool] = []
    if limits is not None:
        texts = [f"{problem.beginning}{text}" for problem, (text, _) in zip(repeated, written, strict=True)]
        passed = _run(texts, repeated, limits, show)
    graded = []
    for number in range(len(problems)):
        mine = slice(number * samples, (number + 1) * samples)
        right = sum(passed[mine])
        tries = [k for k in _TRIES if k <= samples] if passed else []
        metrics = {f"pass@{k}": pass_at_k(samples, right, k) for k in tries}
        texts = tuple(text for text, _ in written[mine])
        graded.append(Graded(texts, metrics, written[mine.start].is_cut))
    return graded


def _run(programs: Sequence[str], problems: Sequence[Problem], limits: Limits, show: Show) -> list[bool]:
    """Which programs solve their problems."""
    run = lambda program, problem: run_program(program, problem.tests, limits, functions=problem.functions)
    passed: list[bool] = []
    if lacks := missing_protection():
        warn(
            f"programs run without {', '.join(lacks)}: this user may not set that up here. Run them in a container "
            "where nothing can be lost."
        )
    pool = ThreadPoolExecutor(os.cpu_count())
    with unreadable() if lacks else contextlib.nullcontext():
        try:
            for outcome in pool.map(run, programs, problems):
                passed.append(outcome.passed)
                show(_WRITING + (1 - _WRITING) * len(passed) / len(programs))
        finally:
            # After Ctrl-C, programs that have not started are not run.
            pool.shutdown(cancel_futures=True)
    return passed


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of pass@k from the number of right samples (arXiv:2107.03374)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
