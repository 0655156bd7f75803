"""006: whether models know what they know; signals and statistics are compared with naive definitions."""

import jax
import numpy as np
import pytest
from factlab import guessing, training
from factlab.rows import EOS, biography_rows

from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.optim import OptimConfig, TableOptimConfig
from memjax.config.run import RunConfig


def test_auroc_is_the_share_of_pairs_in_order_with_ties_half():
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(5, size=40), rng.integers(4, size=30)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in higher for b in lower]
    assert guessing.auroc(higher, lower) == pytest.approx(np.mean(pairs))
    assert guessing.auroc(higher, lower[:0]) is None


def test_a_signal_that_only_tells_attributes_apart_gains_nothing():
    kinds = np.repeat([0, 1], 100)
    higher = np.arange(200) < np.where(kinds == 0, 90, 110)  # 90 of the first attribute, 10 of the second
    assert guessing.auroc(1.0 - kinds[higher], 1.0 - kinds[~higher]) == pytest.approx(0.9)
    assert guessing.auroc_within(kinds, 1.0 - kinds, higher, ~higher) == 0.5


def test_calibration_error_is_the_mean_gap_of_the_bins():
    probability = np.array([0.02, 0.03, 0.95, 0.97, 1.0])
    right = np.array([False, False, True, True, False])
    assert guessing.calibration_error(probability, right) == pytest.approx((0.05 + (0.95 + 0.97 + 1.0 - 2)) / 5)


def test_wrong_answers_are_counted_among_the_most_confident():
    confidence, right = np.array([0.9, 0.1, 0.8, 0.7]), np.array([True, False, False, True])
    assert [guessing.wrong_at(share, confidence, right) for share in (0.25, 0.5, 1.0)] == [0, 0.5, 0.5]


def test_people_are_told_as_often_as_their_group_and_questions_are_chosen_of_every_group():
    rows = biography_rows(BiographiesConfig(num_people=12), told=(0, 1, 4))
    chosen, times = guessing.choose(rows, epochs=2, most=10)
    assert {level: np.count_nonzero(times == level) for level in (0, 2, 8)} == {0: 10, 2: 10, 8: 10}
    assert (chosen // 6 % 3 == np.searchsorted([0, 2, 8], times)).all()
    kept = rows._replace(first_wording=np.arange(72) % 2)
    chosen, times = guessing.choose(kept, epochs=2, most=100)
    assert np.bincount(times)[[0, 2, 8]].tolist() == [24, 12, 12]
    assert (chosen[times > 0] % 2 == 1).all()


@pytest.mark.slow
def test_signals_are_those_of_the_answer_that_the_model_writes():
    rows = biography_rows(BiographiesConfig(num_people=8), told=(0, 3))
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "dtype": "float32", "vocab_size": 259}
    constant = {"lr": 1.0, "schedule": "constant", "warmup_steps": 0}
    config = RunConfig(
        model=ModelConfig(**sizes, memory=MemoryConfig(layers=(0,), num_keys=8, top_k=4)),
        data=DataConfig(packing="none", batch_size=16, sequence_length=rows.length),
        optim=OptimConfig(**constant, table=TableOptimConfig(**constant)),
    )
    trainer = training.FactTrainer(config, rows)
    state = trainer._init(jax.random.key(0))
    facts = np.arange(24)
    found = guessing._ask(trainer, state, facts)
    written = trainer.write_answers(state, facts)
    model = trainer.program.parts.merge(state.params, state.tables)
    full = jax.jit(lambda tokens: (model(tokens), model.hidden(tokens).reads["L0"][-1]))
    for fact in facts.tolist():
        begin, end = rows.answers[fact, 0]
        row = np.concatenate([rows.tokens[fact, 0, :begin], written[fact]])
        answer = written[fact][: trainer.longest]
        answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
        logits, read = full(row[None, :-1])
        chances = np.asarray(jax.nn.softmax(logits[0], axis=-1), np.float64)
        places = np.arange(begin - 1, begin - 1 + len(answer))
        first = np.sort(chances[begin - 1])
        assert found["answer"][fact] == pytest.approx(chances[places, answer].prod(), rel=1e-4)
        assert found["top"][fact] == pytest.approx(first[-1], rel=1e-4)
        assert found["margin"][fact] == pytest.approx(first[-1] - first[-2], rel=1e-2, abs=1e-6)
        assert found["entropy"][fact] == pytest.approx((first * np.log(first)).sum(), rel=1e-4)
        assert found["right"][fact] == (written[fact][: end - begin] == rows.tokens[fact, 0, begin:end].tolist())
        weights = np.asarray(read.weights).reshape(-1, 2, 4).max(axis=2).mean(axis=1)
        assert found["L0 weight"][fact] == pytest.approx(weights[begin - 1], rel=1e-4)
        assert found["L0 weight, prompt"][fact] == pytest.approx(weights[:begin].mean(), rel=1e-4)

    result = guessing.measure(trainer, state, epochs=1.0)
    assert set(result["levels"]) == {"0", "3"}
    assert set(result["signals"]["answer"]) == {"3", "known", "right"}
    assert result["levels"]["3"]["questions"] == 24
