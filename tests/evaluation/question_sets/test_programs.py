"""Programs count as right if they pass their tests, and pass@k is the probability that one of k does."""

import itertools

import pytest

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation.model import EvalModel, Written
from memjax.evaluation.question_sets.formats import Problem
from memjax.evaluation.question_sets.programs import ask_problems, pass_at_k
from memjax.evaluation.question_sets.sandbox import Limits


@pytest.mark.parametrize(("samples", "right", "k"), [(1, 1, 1), (1, 0, 1), (5, 2, 1), (5, 2, 3), (6, 1, 6), (4, 4, 2)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(samples, right, k):
    drawn = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def problem(tests: str) -> Problem:
    head = "def f(x):\n"
    return Problem(text="P/1", prompt=head, solved="", beginning=head, tests=tests, functions=("f",), stop=("\ndef ",))


@pytest.mark.parametrize("limits", [Limits(cpu_seconds=1), None])
def test_only_what_may_be_run_is_marked(drawn_model, monkeypatch, limits):
    model = EvalModel(model=drawn_model, tokenizer=ByteTokenizer(), max_length=32, batch_size=4)
    problems = [problem("assert f(2) == 4"), problem("assert f(2) == 5")]
    bodies = ["    return 2 * x", "    return 5", "    return y", "    return 2 + x"]

    def write(model, prompts, *, max_tokens, stop, sampling, show):
        assert (max_tokens, stop, sampling.temperature) == (20, ("\ndef ",), 0.8)
        assert prompts == ["Before. def f(x):\n"] * 2 + ["def f(x):\n"] * 2
        return [Written(body, False) for body in bodies]

    monkeypatch.setattr(EvalModel, "write", write)
    shares = []
    found = ask_problems(
        model,
        problems,
        ["Before. ", ""],
        max_tokens=20,
        samples=2,
        sampling=SamplingConfig(temperature=0.8),
        limits=limits,
        show=shares.append,
    )
    assert [mark.answers for mark in found] == [tuple(bodies[:2]), tuple(bodies[2:])]
    assert [mark.metrics for mark in found] == ([{"pass@1": 0.5}, {"pass@1": 0.0}] if limits else [{}, {}])
    assert shares == ([pytest.approx(0.9 + 0.025 * done) for done in (1, 2, 3, 4)] if limits else [])
