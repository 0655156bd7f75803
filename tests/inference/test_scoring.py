"""Scores equal those of whole forward passes, whatever the lengths, the batch size and the other requests."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference import scoring
from memjax.inference.scoring import ScoreRequest, request, score


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, size=count).tolist()


def mixed_requests(by_hand) -> list[ScoreRequest]:
    context = [1, *tokens(9, 0)]
    greedy = by_hand.write(context, 3)
    assert len(greedy) == 3
    return [
        ScoreRequest(context, tokens(1, 1)),  # one token
        ScoreRequest(context, greedy[:1]),  # another token after the same context
        ScoreRequest(context, greedy),
        ScoreRequest(context, [*greedy[:2], greedy[2] ^ 1]),
        ScoreRequest([1], tokens(5, 2)),  # no context but the begin token
        ScoreRequest([1], []),
        ScoreRequest([1, *tokens(50, 3)], tokens(4, 4)),  # a context that is too long
        ScoreRequest([1, *tokens(15, 5)], tokens(1, 6)),  # a context that just fits into 16
        ScoreRequest([1, *tokens(5, 7)], tokens(75, 8)),  # a continuation that spans several windows
        ScoreRequest([1], tokens(32, 9)),
        *(ScoreRequest(context, [token]) for token in range(3, 40)),
    ]


# Several batch sizes are tried only where each needs a single shape, as compiling shapes takes most of the time.
@pytest.mark.parametrize(("max_length", "batch_sizes"), [(16, (1, 8, 32)), (32, (8,))])
def test_scores_are_those_of_whole_forward_passes_at_any_batch_size(drawn_model, by_hand, max_length, batch_sizes):
    requests = mixed_requests(by_hand)
    expected = [by_hand.score(*one, max_length) for one in requests]
    assert [is_greedy for _, is_greedy in expected][:4] == [False, True, True, False]
    for batch_size in batch_sizes:
        found = score(drawn_model, requests, max_length=max_length, batch_size=batch_size)
        # Nats in float32, of at most 75 tokens.
        np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=0, atol=1e-4)
        assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]


def test_few_programs_are_compiled_and_equal_rows_are_computed_once(drawn_model, by_hand, monkeypatch):
    computed = []

    def scored(graphdef, state, batch):
        computed.append(batch["tokens"])
        shape = batch["targets"].shape
        return np.zeros(shape, np.float32), np.ones(shape, bool)

    monkeypatch.setattr(scoring, "_scored", scored)
    shares = []
    score(drawn_model, mixed_requests(by_hand), max_length=32, batch_size=4, show=shares.append)
    assert {batch.shape for batch in computed} == {(4, 16), (4, 32), (1, 16)}
    assert shares[-1] == 1
    assert shares == sorted(shares)
    context = [1, *tokens(9, 0)]
    rows = [row for batch in computed for row in batch.tolist() if row[:10] == context]
    # 39 tokens follow, at most 16 per sequence; longer sequences share the row of one of these.
    assert len(rows) == 3


def test_every_number_of_likeliest_tokens_uses_one_of_two_programs(drawn_model):
    program: Any = scoring._prompt_likelihoods
    before = program._cache_size()
    scorers = itertools.cycle([scoring.PromptScorer(drawn_model), scoring.PromptScorer(drawn_model)])
    found = {count: next(scorers)([1, 5, 9], count) for count in (1, 2, 5, 6, 20)}
    assert program._cache_size() == before + 2
    for count, (first, second) in found.items():
        assert (len(first.top), len(second.top)) == (count, count)
        assert list(first.top.items()) == list(found[20][0].top.items())[:count]


@pytest.mark.parametrize(("short", "widths"), [(3, [32, 32]), (4, [16, 32, 32])])
def test_rows_that_fill_no_batch_join_the_next_larger_shape(drawn_model, monkeypatch, short, widths):
    computed = []

    def scored(graphdef, state, batch):
        computed.append(batch["tokens"].shape)
        return np.zeros(batch["targets"].shape, np.float32), np.ones(batch["targets"].shape, bool)

    monkeypatch.setattr(scoring, "_scored", scored)
    requests = [ScoreRequest([1, number], [5]) for number in range(short)]
    requests += [ScoreRequest([1, *tokens(20, number)], [5]) for number in range(8 - short if short < 4 else 8)]
    assert len(score(drawn_model, requests, batch_size=4)) == len(requests)
    assert computed == [(4, width) for width in widths]


def test_a_context_needs_a_token(drawn_model):
    with pytest.raises(ValueError, match="the context of request 1 is empty"):
        score(drawn_model, [ScoreRequest([1], [5]), ScoreRequest([], [5])], max_length=8)


@pytest.mark.parametrize(
    ("name", "request_"), [("context", ScoreRequest([300], [5])), ("continuation", ScoreRequest([1], [5, -2]))]
)
def test_an_id_outside_the_vocabulary_is_refused(drawn_model, name, request_):
    with pytest.raises(ValueError, match=rf"the {name} of request 1 hold (300|-2); the model knows 0\.\.258"):
        score(drawn_model, [ScoreRequest([1], [5]), request_], max_length=8)


def test_two_devices_score_what_one_scores(drawn_model, by_hand):
    requests = mixed_requests(by_hand)[:3]
    mesh = jax.make_mesh(
        (1, 2), ("data", "memory"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:2]
    )
    with jax.set_mesh(mesh):
        found = score(drawn_model, requests, max_length=16, batch_size=4)
    expected = [by_hand.score(*one, 16) for one in requests]
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=0, atol=1e-4)


def test_a_pair_of_texts_is_encoded_as_one_and_spaces_go_with_the_word():
    tokenizer = ByteTokenizer()
    found = request(tokenizer, "The sky is ", "blue")
    assert found == ScoreRequest([1, *tokenizer.encode("The sky is")], tokenizer.encode(" blue"))
    assert request(tokenizer, "", "blue") == ScoreRequest([1], tokenizer.encode("blue"))
