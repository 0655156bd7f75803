"""Sequences that begin alike share a row, which changes no score and saves most of the tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import drawn
from memjax.config.model import RopeScalingConfig
from memjax.inference import scoring
from memjax.inference.score_rows import packed, rows_of
from memjax.inference.scoring import ScoreRequest, score


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, size=count).tolist()


def multiple_choice(examples: int, questions: int) -> list[ScoreRequest]:
    """Four choices each for questions after the same examples."""
    before = [1, *tokens(examples, 0)]
    return [
        ScoreRequest([*before, *tokens(4, number)], tokens(1 + choice % 3, 100 * number + choice))
        for number in range(1, questions + 1)
        for choice in range(4)
    ]


CASES = {
    "the same examples": multiple_choice(24, 6),
    "single tokens, more than fit into a row": [ScoreRequest([1, *tokens(20, 0)], [token]) for token in range(3, 60)],
    "one context continues another": [ScoreRequest([1, *tokens(length, 0)], [7, 8]) for length in range(20, 40)],
    "predictions in the shared part": [ScoreRequest([1], [*tokens(25, 0), last]) for last in range(3, 9)],
    "the same twice": [ScoreRequest([1, *tokens(20, 0)], tokens(20, 1))] * 2,
    "nothing shared": [ScoreRequest([1, *tokens(20, seed)], [5]) for seed in range(5)],
}


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("max_length", [64, 28])
def test_scores_are_those_of_whole_forward_passes(drawn_model, by_hand, what, max_length):
    requests = CASES[what]
    found = score(drawn_model, requests, max_length=max_length, batch_size=4)
    expected = [by_hand.score(*one, max_length) for one in requests]
    # Nats in float32, of at most 28 tokens.
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=0, atol=1e-4)
    assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]


def computed_tokens(model, requests, monkeypatch) -> int:
    sizes = []

    def scored(graphdef, state, batch):
        sizes.append(batch["tokens"].size)
        return np.zeros(batch["targets"].shape, np.float32), np.ones(batch["targets"].shape, bool)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "_scored", scored)
        score(model, requests, batch_size=32)
    return sum(sizes)


def test_choices_after_the_same_examples_cost_a_fraction_of_their_tokens(drawn_model, monkeypatch):
    requests = multiple_choice(200, 50)
    whole = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    assert computed_tokens(drawn_model, requests, monkeypatch) < whole / 5
    alone = [requests[0]]
    assert computed_tokens(drawn_model, alone, monkeypatch) == 32 * 256


@pytest.mark.parametrize(
    "changed", [{"sliding_window": 8}, {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_length": 16}}]
)
def test_positions_that_depend_on_the_row_forbid_sharing_it(drawn_model, changed):
    if "rope_scaling" in changed:
        changed = {"rope_scaling": RopeScalingConfig(**changed["rope_scaling"])}
    model = drawn(dataclasses.replace(drawn_model.config, **changed), seed=1)
    requests = multiple_choice(24, 3)
    found = score(model, requests, batch_size=4)
    forward = nnx.jit(lambda model, ids: jax.nn.log_softmax(model(ids))[0])
    for one, (context, continuation) in zip(found, requests, strict=True):
        log_p = forward(model, np.array([[*context, *continuation[:-1]]], np.int32))
        expected = log_p[np.arange(-len(continuation), 0), continuation].sum()
        assert one.log_likelihood == pytest.approx(float(expected), abs=1e-4)


def test_two_devices_score_shared_rows_alike(drawn_model, by_hand):
    requests = multiple_choice(24, 5)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((1, 2), ("data", "memory"), axis_types=kinds, devices=jax.devices()[:2])):
        found = score(drawn_model, requests, batch_size=6)
    expected = [by_hand.score(*one, 64)[0] for one in requests]
    np.testing.assert_allclose([one[0] for one in found], expected, rtol=0, atol=1e-4)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@settings(max_examples=200)
@given(st.lists(st.tuples(ids, ids), max_size=30), st.integers(1, 50))
def test_every_prediction_follows_its_own_tokens(pairs, max_length):
    """Read as attention sees it, a row holds each sequence before its predictions, at its positions."""
    requests = [ScoreRequest(*pair) for pair in pairs]
    seen: dict[int, list[tuple[list[int], int]]] = {owner: [] for owner in range(len(requests))}
    for pack in packed(rows_of(requests, max_length), can_share=True):
        assert pack.length <= pack.shape.width
        assert pack.depth <= pack.shape.depth
        names = {"tokens": -9, "token_mask": 0, "positions": -9, "segments": -1}
        batch = {name: np.full((1, pack.shape.width), value) for name, value in names.items()}
        batch |= {name: np.full((1, pack.shape.depth), -9) for name in ("predicted", "targets")}
        pack.write(batch, 0)
        one = {name: array[0] for name, array in batch.items()}
        assert one["token_mask"].tolist() == [1] * pack.length + [0] * (pack.shape.width - pack.length)
        for owner, where in pack.owners():
            for place, target in zip(one["predicted"][where], one["targets"][where], strict=True):
                segments = one["segments"][: place + 1]
                own = (segments == segments[-1]) | (segments == -1)
                assert one["positions"][: place + 1][own].tolist() == list(range(own.sum()))
                seen[owner].append((one["tokens"][: place + 1][own].tolist(), target))
    for owner, (context, continuation) in enumerate(requests):
        ids, expected = [*context, *continuation], []
        for place in range(len(context), len(ids)):
            window = (place - len(context)) // max_length
            stop = min(len(context) + (window + 1) * max_length, len(ids))
            expected.append((ids[max(0, stop - 1 - max_length) : place], ids[place]))
        assert sorted(seen[owner]) == sorted(expected)
