"""Parameter counts against published totals, and the FLOPs formula against XLA's own count."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from memjax.config.load import load
from memjax.config.memory import MemoryConfig, PEERConfig
from memjax.config.model import ExpertsConfig, ModelConfig
from memjax.config.optim import OptimConfig
from memjax.config.run import RunConfig
from memjax.models.counts import count_parameters, training_flops
from memjax.models.parts import DecoderParts
from memjax.training.optimizer import without_gradient_where_frozen
from memjax.training.plan.report import describe

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        # From Table 1 of arXiv:2412.09764, which prints 3.377 for the plain memory although its shapes give 3.378.
        pytest.param("1.3b_memory", 3.378, marks=pytest.mark.slow),
        pytest.param("1.3b_memory_plus_1m", 3.368, marks=pytest.mark.slow),
        pytest.param("1.3b_memory_plus_4m", 9.823, marks=pytest.mark.slow),
        pytest.param("1.3b_memory_plus_16m", 35.618, marks=pytest.mark.slow),
        pytest.param("1.3b_memory_plus_64m", 138.748, marks=pytest.mark.slow),
        pytest.param("1.3b_moe", 3.546, marks=pytest.mark.slow),  # the table prints 3.545
        pytest.param("1.3b_dense", 1.262, marks=pytest.mark.slow),
        pytest.param("1.3b_peer", 3.646, marks=pytest.mark.slow),
        ("134m_dense", 0.134),
        pytest.param("373m_dense", 0.374, marks=pytest.mark.slow),
        # Not in the table; by the same formula.
        ("134m_peer", 1.037),
        pytest.param("373m_peer", 1.575, marks=pytest.mark.slow),
        pytest.param("720m_peer", 2.517, marks=pytest.mark.slow),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    counts = count_parameters(DecoderParts.of(load(RunConfig, CONFIGS / f"{preset}.yaml").model))
    assert round(counts.total / 1e9, 3) == billions


def test_counts_by_hand():
    memory = MemoryConfig(layers=(1,), num_keys=5, num_heads=3, top_k=2, key_dim=4, value_dim=6)
    config = ModelConfig(dim=8, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=7, vocab_size=259, memory=memory)
    counts = count_parameters(DecoderParts.of(config))
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    feed_forward = 3 * 8 * 7
    address = 8 * 3 * 4 + 3 * 4 + 3 * 2 * 5 * 2
    gate_and_output = (8 * 6 + 6) + (6 * 8 + 8)
    norms = 5 * 8
    assert counts.dense == 2 * 259 * 8 + 2 * attention + feed_forward + address + gate_and_output + norms
    assert counts.table == 25 * 6
    assert counts.total == counts.dense + counts.table
    # A token uses one row of the input embedding and 3 x 2 rows of the table.
    assert counts.active == counts.dense - 258 * 8 + 6 * 6


@pytest.mark.parametrize(
    ("size", "billions"),
    # The second is from Table 1, the first follows from its formula; neither counts routers.
    [("134m", 0.983), pytest.param("1.3b", 3.545, marks=pytest.mark.slow)],
)
def test_presets_with_experts_have_the_published_size_and_the_arithmetic_of_their_dense_model(size, billions):
    config = load(RunConfig, CONFIGS / f"{size}_moe.yaml")
    model, parts = config.model, DecoderParts.of(config.model)
    counts = count_parameters(parts)
    assert round((counts.total - counts.routers) / 1e9, 3) == billions
    assert f"  without routers           {billions:.3f} b\n" in describe(config, parts, data_axis=1)
    assert training_flops(parts, 4096).experts == 6 * (
        model.num_layers * 3 * model.dim * model.ffn_dim + counts.routers
    )


def test_experts_by_hand():
    experts = ExpertsConfig(layers=(0,), num_experts=5, ffn_dim=6, top_k=2)
    config = ModelConfig(dim=8, num_layers=2, num_heads=2, ffn_dim=7, vocab_size=259, memory=None, experts=experts)
    parts = DecoderParts.of(config)
    counts, flops = count_parameters(parts), training_flops(parts, 16)
    assert counts.experts == 5 * 3 * 8 * 6
    assert counts.routers == 8 * 5
    assert counts.dense == 2 * 259 * 8 + 2 * 4 * 8 * 8 + 3 * 8 * 7 + 8 * 5 + 5 * 8
    assert counts.total == counts.dense + counts.experts
    assert counts.active == counts.dense - 258 * 8 + 2 * 3 * 8 * 6
    assert flops.experts == 6 * (2 * 3 * 8 * 6 + 8 * 5)
    assert flops.feed_forward == 6 * 3 * 8 * 7
    assert flops.attention == 6 * 2 * (4 * 8 * 8 + 16 * 8)
    assert (flops.head, flops.memory_search, flops.memory_read) == (6 * 259 * 8, 0, 0)


def test_flops_are_those_that_xla_counts():
    length = 64
    config = ModelConfig(
        dim=128, num_layers=2, num_heads=2, head_dim=48, ffn_dim=352, vocab_size=512, dtype="float32", memory=None
    )
    parts = DecoderParts.of(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    forward = jax.jit(lambda params, tokens: parts.merge(params, {})(tokens))
    analysis = forward.lower(parts.abstract_params, tokens).compile().cost_analysis()
    assert isinstance(analysis, dict)
    # Forward and backward cost three forward passes. XLA also computes the masked half of attention.
    masked_half = 2 * length * 2 * 48 * config.num_layers
    counted = 3 * (analysis["flops"] / length - masked_half)
    assert training_flops(parts, length).total == pytest.approx(counted, rel=0.03)


def test_flops_of_a_memory_layer_are_those_of_its_search_and_its_reads():
    memory = MemoryConfig(layers=(0,), num_keys=16, num_heads=2, top_k=4, key_dim=8, value_dim=32)
    dense = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=24, vocab_size=259, memory=None)
    both = (dataclasses.replace(dense, memory=memory), dense)
    with_memory, without = (training_flops(DecoderParts.of(config), 8).total for config in both)
    feed_forward = 3 * 16 * 24
    projections = 16 * 2 * 8 + 16 * 32 + 32 * 16
    scores = 2 * 2 * 16 * 4
    reads = 2 * 4 * 32
    assert with_memory - without == 6 * (projections + scores + reads - feed_forward)
    groups = training_flops(DecoderParts.of(both[0]), 8)
    assert groups.memory_search == 6 * (16 * 2 * 8 + scores)
    assert groups.memory_read == 6 * (16 * 32 + 32 * 16 + reads)


def test_frozen_parts_compute_no_gradients_of_their_weights_and_none_at_all_before_the_first_memory():
    memory = MemoryConfig(layers=(1,), num_keys=8, num_heads=1, top_k=2, key_dim=8)
    config = ModelConfig(
        dim=128, num_layers=3, num_heads=2, ffn_dim=352, vocab_size=512, dtype="float32", memory=memory
    )
    parts, length = DecoderParts.of(config), 64

    def counted(freeze_dense: bool) -> float:
        """XLA's FLOPs per token of a loss and its gradient."""
        optim = OptimConfig(freeze_dense=freeze_dense)

        def loss(params, tables, tokens):
            model = parts.merge(without_gradient_where_frozen(optim, params), tables)
            return jax.nn.logsumexp(model(tokens), axis=-1).sum()

        lowered = jax.jit(jax.value_and_grad(loss)).lower(
            parts.abstract_params, parts.abstract_tables, jax.ShapeDtypeStruct((1, length), jnp.int32)
        )
        analysis = lowered.compile().cost_analysis()
        assert isinstance(analysis, dict)
        return analysis["flops"] / length

    attention, feed_forward, head = 4 * 128 * 128, 3 * 128 * 352, 128 * 512
    # Scores and weighted values of a token that on average attends to half of the sequence.
    seen = length // 2 * 128 * 2
    before = 2 * attention + feed_forward
    by_hand = 4 * before + 2 * (attention + feed_forward + head) + 4 * 2 * seen
    both = (training_flops(parts, length, freeze_dense=frozen).total for frozen in (False, True))
    assert next(both) - next(both) == by_hand
    # XLA also computes the masked half of attention and counts norms, gates and softmax, here a thirtieth of the total.
    masked = 4 * 2 * seen
    assert counted(False) - counted(True) == pytest.approx(by_hand + masked, rel=0.04)


def test_a_peer_layer_by_hand():
    experts = PEERConfig(layers=(0,), num_keys=16, num_heads=2, top_k=4, key_dim=8)
    dense = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=24, vocab_size=259, memory=None)
    parts, without = (DecoderParts.of(config) for config in (dataclasses.replace(dense, peer=experts), dense))
    feed_forward, queries = 3 * 16 * 24, 16 * 2 * 8
    counts, before = count_parameters(parts), count_parameters(without)
    assert counts.table == 2 * 16**2 * 16
    assert counts.dense - before.dense == queries + 2 * 8 + 2 * 2 * 16 * 4 - feed_forward
    # A token uses the rows of its 2 x 4 experts in both tables.
    reads = 2 * 2 * 4 * 16
    assert counts.active - before.active == counts.dense - before.dense + reads
    flops = training_flops(parts, 8)
    assert (flops.memory_search, flops.memory_read) == (6 * (queries + 2 * 2 * 16 * 4), 6 * reads)
    assert flops.total - training_flops(without, 8).total == 6 * (queries + 2 * 2 * 16 * 4 + reads - feed_forward)


def test_a_window_counts_the_tokens_that_are_seen():
    whole = ModelConfig(dim=16, num_layers=3, num_heads=2, vocab_size=259, memory=None)
    parts = [DecoderParts.of(dataclasses.replace(whole, sliding_window=window)) for window in (None, 64, 16)]
    full, long, short = (training_flops(part, 64).total for part in parts)
    assert full == long
    # Areas of the mask by hand; like the formula, they count each token's own position half.
    area = 64 * 64 / 2 - 48 * 48 / 2
    assert full - short == 12 * 3 * 16 * (64 * 64 / 2 - area) / 64


def test_a_dry_run_shows_parameters_and_mesh():
    config = load(RunConfig, CONFIGS / "134m_memory_plus_1m.yaml", ["--mesh.memory", "3"])
    text = describe(config, DecoderParts.of(config.model), data_axis=2)
    assert "805,306,368 (1 x 1,048,576 slots)" in text
    assert "data 2 x memory 3 = 6 devices" in text
    both = load(RunConfig, CONFIGS / "134m_peer.yaml", ["--model.memory", "{layers: [2], num_keys: 100}"])
    assert "(1 x 10,000 slots, 2 x 589,824 slots)" in describe(both, DecoderParts.of(both.model), data_axis=1)
