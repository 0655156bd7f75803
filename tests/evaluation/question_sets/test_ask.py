"""Answers are marked as the sets are meant; generation itself is compared with brute force in test_harness."""

import pytest

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation.question_sets import ask
from memjax.evaluation.question_sets.ask import Examinee, Written, ask_choices, ask_open, write
from memjax.evaluation.question_sets.formats import ChoiceQuestion, OpenQuestion, Option
from memjax.inference.scoring import Score

TOKENIZER = ByteTokenizer()


@pytest.fixture
def who(drawn_model) -> Examinee:
    return Examinee(model=drawn_model, tokenizer=TOKENIZER, max_length=32, batch_size=4)


def test_the_likeliest_choice_counts_as_it_is_and_by_its_length(who, monkeypatch):
    choices = ("yes", "certainly not")
    options = tuple(Option("Is it?", f" {choice}") for choice in choices)
    question = ChoiceQuestion(text="Is it?", prompt="", solved="", choices=choices, answer=1, options=options)
    asked = []

    def score(model, requests, *, max_length, batch_size, show):
        asked.extend(requests)
        return [Score(-3.0, False), Score(-6.5, False)] * 2

    monkeypatch.setattr(ask, "score", score)
    found = ask_choices(who, [question, question], ["", "A text in front of the question.\n\n"], show=lambda _: None)
    # -3 / 3 letters against -6.5 / 13.
    assert [mark.metrics for mark in found] == [{"accuracy": 0, "normalised_accuracy": 1, "chance": 0.5}] * 2
    assert [mark.answers for mark in found] == [("yes",)] * 2
    assert [mark.is_cut for mark in found] == [False, True]
    assert TOKENIZER.decode([*asked[3].context, *asked[3].continuation]).endswith("question.\n\nIs it? certainly not")


def test_a_short_answer_ends_with_its_line(who, monkeypatch):
    question = OpenQuestion(text="Who?", prompt="Who? Answer:", solved="", answers=("Paul", "the Paul McCartney"))

    def written(who, prompts, *, max_tokens, stop, sampling, show):
        assert (prompts, max_tokens, stop) == (["Before. Who? Answer:"], 9, ("\n",))
        return [Written(" Paul McCartney of Liverpool", True)]

    monkeypatch.setattr(ask, "write", written)
    sampling = SamplingConfig()
    (mark,) = ask_open(who, [question], ["Before. "], max_tokens=9, sampling=sampling, show=lambda _: None)
    assert mark.answers == ("Paul McCartney of Liverpool",)
    # Of four words two are among the two of the second answer.
    assert mark.metrics == {"exact_match": 0, "f1": pytest.approx(2 / 3)}
    assert mark.is_cut


def test_prompts_keep_at_least_half_of_what_the_model_sees(who, monkeypatch):
    rooms, shares = [], []

    def continue_texts(model, tokenizer, prompts, *, max_prompt_tokens, **_):
        rooms.append(max_prompt_tokens)
        return [ask.Written(prompt.upper(), False) for prompt in prompts]

    monkeypatch.setattr(ask, "continue_texts", continue_texts)
    prompts = ["b" * 11, "c" * 30, "a"]
    for max_tokens in (8, 400):
        found = write(who, prompts, max_tokens=max_tokens, stop=(), sampling=SamplingConfig(), show=shares.append)
        assert [text for text, _ in found] == [prompt.upper() for prompt in prompts]
        # The begin token is a token, too.
        assert [is_cut for _, is_cut in found] == [False, True, False]
    assert rooms == [24, 16]
    assert shares == [1 / 3, 2 / 3, 1] * 2
