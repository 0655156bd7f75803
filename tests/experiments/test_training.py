"""The experiments train with the library's step and schedule, and check its greedy answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factlab import training
from factlab.rows import biography_rows, draw_order
from factlab.steps import OutOfTime

from memjax.config.data import BiographiesConfig, DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.optim import OptimConfig, TableOptimConfig
from memjax.config.run import RunConfig
from memjax.config.training import TrainConfig
from memjax.memory.layer import MemoryLayer
from memjax.sharding.mesh import make_mesh
from memjax.training.program import TrainProgram
from memjax.training.step import make_train_step

RATES = training.Rates(2e-2, 3e-1)
SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "dtype": "float32"}


@pytest.fixture(scope="module")
def rows():
    return biography_rows(BiographiesConfig(num_people=8))


@pytest.fixture(scope="module")
def trainer(rows):
    return training.FactTrainer(config_of(rows), rows)


def config_of(rows, **schedule) -> RunConfig:
    model = ModelConfig(**SIZES, vocab_size=259, memory=MemoryConfig(layers=(0,), num_keys=8, top_k=4))
    at = lambda lr: {"lr": lr, "schedule": "constant", "warmup_steps": 0} if not schedule else {"lr": lr, **schedule}
    rates = RATES if schedule else training.Rates(1.0, 1.0)
    return RunConfig(
        model=model,
        data=DataConfig(packing="none", batch_size=16, sequence_length=rows.length),
        optim=OptimConfig(**at(rates.lr), table=TableOptimConfig(**at(rates.table_lr))),
        train=TrainConfig(steps=50),
    )


@pytest.mark.slow
def test_a_run_is_the_librarys_step_at_the_librarys_schedule_and_its_answers_are_checked_one_by_one(rows, trainer):
    result = trainer.run(RATES, exposures=50 * 16 / 48, seed=3)

    plain = TrainProgram.of(config_of(rows, schedule="cosine", warmup_steps=100, final_fraction=0.05))
    mesh = make_mesh(plain.config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, step = plain.init(jax.random.key(3), mesh), make_train_step(plain, mesh)
        for numbers in draw_order(rows, batch_size=16, steps=50, seed=3):
            state, _ = step(state, batch_by_hand(rows, numbers))
    model = plain.parts.merge(state.params, state.tables)
    right, nats = [], 0.0
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, rows.tokens[:, 0, :-1]), np.float64)
    for row, scores, (begin, end) in zip(rows.tokens[:, 0], logits, rows.answers[:, 0], strict=True):
        wanted, scores = row[begin:end], scores[begin - 1 : end - 1]
        right.append((scores.argmax(axis=1) == wanted).all())
        nats += sum(np.log(np.exp(line).sum()) - line[token] for line, token in zip(scores, wanted, strict=True))

    assert result["steps"] == 50
    assert result["recall"] == pytest.approx(np.mean(right), abs=2 / 48)  # near ties may fall either way
    assert result["stored_bits"] == pytest.approx(rows.bits.sum() - nats / np.log(2), rel=1e-2)
    untrained = 8 * (5 * 2 + 4) * np.log(259)  # five one-word answers and a date, each with its end token
    assert nats < 0.6 * untrained


def batch_by_hand(rows, numbers):
    tokens = rows.tokens.reshape(-1, rows.tokens.shape[2])[numbers]
    mask, real = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, np.int32)
    for line, (begin, end) in enumerate(rows.answers.reshape(-1, 2)[numbers]):
        mask[line, begin:end] = 1
        real[line, : end - 1] = 1
    places = np.broadcast_to(np.arange(rows.length, dtype=np.int32), (len(numbers), rows.length))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": real[:, :-1], "positions": places}
    return {name: jnp.asarray(array)[None] for name, array in (batch | {"loss_mask": mask[:, 1:]}).items()}


def test_in_the_control_every_token_of_a_sentence_reads_the_slots_of_its_fact(rows):
    trainer = training.FactTrainer(config_of(rows), rows, perfect_address=True)
    facts = jnp.array([5, 0, 5])
    addressed = trainer._addressed(trainer.on_device.slots, facts)
    parts = addressed.parts
    params, tables = jax.jit(lambda key: parts.init(key))(jax.random.key(0))
    memory = parts.merge(params, tables).blocks[0].lookup
    assert isinstance(memory, MemoryLayer)
    lookup = memory.lookup(jnp.zeros((3 * rows.length, 16)))
    read = np.asarray(lookup.indices).reshape(3, rows.length, -1)
    assert (read == read[:, :1]).all()
    assert (read[0] == read[2]).all()
    assert (read[0, 0] != read[1, 0]).any()
    assert np.asarray(lookup.weights).sum(axis=1) == pytest.approx(2)  # 1 for each head


def test_a_gated_layer_without_one_of_its_projections_has_the_other(rows):
    trainers = {part: training.FactTrainer(config_of(rows), rows, without=part) for part in ("gate_proj", "value_proj")}
    arrays = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape), leaf.dtype),
        (trainers["gate_proj"].program.parts.abstract_params, trainers["gate_proj"].program.parts.abstract_tables),
    )
    own = lambda part, name: np.asarray(arrays[0]["blocks"][0]["memory"][part][name][...])
    x, bag = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)
    gate = x @ own("gate_proj", "kernel") + own("gate_proj", "bias")
    projected = bag @ own("value_proj", "kernel") + own("value_proj", "bias")
    expected = {"gate_proj": projected, "value_proj": bag * gate / (1 + np.exp(-gate))}
    for part, trainer in trainers.items():
        memory = trainer.program.parts.merge(*arrays).blocks[0].lookup
        assert isinstance(memory, MemoryLayer)
        np.testing.assert_allclose(memory.combine(jnp.asarray(x), jnp.asarray(bag)), expected[part], rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_would_miss_its_deadline_ends_early(trainer):
    with pytest.raises(OutOfTime, match="more are needed"):
        trainer.run(RATES, exposures=1e4, seed=0, deadline=0.0)


def test_a_config_with_its_own_rates_is_refused(rows):
    with pytest.raises(ValueError, match=r"optim must have lr=1.*rates are given"):
        training.FactTrainer(config_of(rows, warmup_steps=5), rows)
