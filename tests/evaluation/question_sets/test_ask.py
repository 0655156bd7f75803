"""Answers are graded by the rules of each set; test_harness compares generation itself with brute force."""

import pytest

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation.model import EvalModel, Written
from memjax.evaluation.question_sets.ask import ask_open
from memjax.evaluation.question_sets.formats import OpenQuestion


def test_a_short_answer_ends_with_its_line(drawn_model, monkeypatch):
    model = EvalModel(model=drawn_model, tokenizer=ByteTokenizer(), max_length=32, batch_size=4)
    question = OpenQuestion(text="Who?", prompt="Who? Answer:", solved="", answers=("Paul", "the Paul McCartney"))

    def written(model, prompts, *, max_tokens, stop, sampling, show):
        assert (prompts, max_tokens, stop) == (["Before. Who? Answer:"], 9, ("\n",))
        return [Written(" Paul McCartney of Liverpool", True)]

    monkeypatch.setattr(EvalModel, "write", written)
    sampling = SamplingConfig()
    (found,) = ask_open(model, [question], ["Before. "], max_tokens=9, sampling=sampling, show=lambda _: None)
    assert found.answers == ("Paul McCartney of Liverpool",)
    # Two of the four words match the two words of the second answer.
    assert found.metrics == {"exact_match": 0, "f1": pytest.approx(2 / 3)}
    assert found.is_cut
