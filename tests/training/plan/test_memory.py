import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.memory.row_grad_reduce import PICK_BYTES
from memjax.training.plan import memory as memory_plan
from memjax.training.plan import savings
from memjax.training.program import TrainProgram

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"

# Gigabytes of these steps on one H100: XLA's arguments and temporaries, compiled with JAX 0.11.2 for a described
# device (`jax.experimental.topologies`), thus without cuDNN's workspaces.
COMPILED = {
    "two layers: most of it is the loss": ("373m_dense", "--model.num_layers 2", 3.326),
    "memory": ("373m_memory_plus_1m", "--model.num_layers 4 --model.memory.layers 1,2,3", 9.286),
    "blocks again": ("373m_dense", "--model.num_layers 6 --train.remat block", 2.997),
    "all but products again": ("373m_dense", "--model.num_layers 6 --train.remat dots", 4.910),
    "memory, blocks again": (
        "373m_memory_plus_1m",
        "--model.num_layers 4 --model.memory.layers 1,2,3 --train.remat block",
        7.437,
    ),
    "documents, attention in chunks": (
        "373m_dense",
        "--model.num_layers 3 --train.attention chunked --data.document_mask true",
        4.286,
    ),
}

GPU = "--model.dtype bfloat16 --data.batch_size 4 --data.document_mask false --train.remat none"


def config_of(preset: str, settings: str) -> RunConfig:
    table = " --model.memory.table_dtype float32" if "memory" in preset else ""
    return load(RunConfig, CONFIGS / f"{preset}.yaml", f"{GPU}{table} {settings}".split())


@pytest.mark.parametrize("name", COMPILED)
def test_prediction_is_at_most_5_percent_below_and_15_above_what_a_gpu_needs(name):
    preset, settings, gigabytes = COMPILED[name]
    predicted = memory_plan.plan(config_of(preset, settings), data_axis=1).total / 1e9
    assert 0.95 * gigabytes <= predicted <= 1.15 * gigabytes


def test_state_is_counted_by_device_and_exactly():
    small = "--mesh.memory 3 --data.batch_size 6 --model.num_layers 3 --model.memory.layers 0,1,2"
    config = load(RunConfig, CONFIGS / "134m_memory_plus_1m.yaml", small.split())
    found = memory_plan.plan(config, data_axis=2)
    # 2**20 float32 rows of 768 columns over 3 devices, a second moment per 256 columns, and counters on each device.
    assert found.state["tables"] == 2**20 * 256 * 4
    assert found.state["optimizer of the tables"] == 2**20 * 4
    assert found.state["read counters"] == 3 * 2**20 * 4
    text = memory_plan.describe(found)
    assert "  tables                    1.07 GB" in text
    assert text.startswith("bytes per device ")


def test_the_tensor_axis_halves_what_it_splits_and_nothing_else():
    # Biases, norms and the unsplit part of the memory are small here.
    small = "--model.num_layers 3 --model.memory.layers 1 --mesh.dense replicated --mesh.data 2"
    one, two = (
        memory_plan.plan(config_of("373m_memory_plus_1m", f"{small} --mesh.tensor {tensor}"), data_axis=2)
        for tensor in (1, 2)
    )
    for name in ("dense parameters", "their optimizer"):
        assert 0.5 < two.state[name] / one.state[name] < 0.6
    for name in ("tables", "optimizer of the tables", "read counters"):
        assert two.state[name] == one.state[name] > 0
    assert 0.5 < two.temporary["activations, attention"] / one.temporary["activations, attention"] < 0.8
    assert two.temporary["activations, memory"] == one.temporary["activations, memory"] > 0
    assert two.temporary["logits"] <= one.temporary["logits"]
    assert 2 * two.temporary["output matrix's gradient"] == one.temporary["output matrix's gradient"]


def test_a_peer_layer_is_counted_with_both_its_tables():
    small = "--model.num_layers 2 --model.peer.layers 1 --model.peer.table_dtype bfloat16"
    config = load(RunConfig, CONFIGS / "134m_peer.yaml", f"{GPU} {small}".split())
    found = memory_plan.plan(config, data_axis=1)
    assert found.state["tables"] == 2 * 768**2 * 768 * 2
    assert found.state["optimizer of the tables"] == 2 * 768**2 * 3 * 4
    tokens = config.data.batch_size * config.data.sequence_length
    # Residual stream, its norm and queries; score, index, weight, product and activation of each pick; token and bag.
    kept = (2 * 768 + 4 * 256) * 2 + 128 * 20 + 2 * 768 * 2
    assert found.temporary["activations, memory"] == tokens * kept
    update = memory_plan._Planner(config, TrainProgram.of(config), 1)
    # Indices, weights for both tables, and the vectors that these multiply: the token and the bag's cotangent.
    assert update.row_gradients()["row gradients"] == tokens * (128 * (4 + 4 + 4) + 2 * 768 * 2)
    assert update.row_update()["sorted picks"] == tokens * (128 * PICK_BYTES + 768 * 2)
    assert "--model.peer.num_keys 543" in {name for name, _ in savings.savings(config, data_axis=1)}


def test_more_devices_and_micro_batches_need_less_of_each():
    config = config_of("373m_dense", "--data.batch_size 8 --model.num_layers 1")
    plans = [memory_plan.plan(config, data_axis=devices) for devices in (1, 2, 4)]
    activations = [plan.temporary["activations, attention"] for plan in plans]
    assert activations[0] == 2 * activations[1] == 4 * activations[2]
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=2))
    again = memory_plan.plan(twice, data_axis=1)
    assert again.temporary["activations, attention"] == activations[1]
    # The sum of the micro-batches' gradients, in the parameters' dtype.
    assert again.temporary["accumulated gradients"] == plans[0].state["dense parameters"]


def test_experts_are_planned_for():
    small = "--model.num_layers 2"
    dense, experts = (memory_plan.plan(config_of(f"373m_{kind}", small), data_axis=1) for kind in ("dense", "moe"))
    # 7 more feed-forward layers in each of 2 blocks, and the routers.
    more = 4 * 2 * (7 * 3 * 1024 * 2816 + 8 * 1024)
    assert experts.state["dense parameters"] - dense.state["dense parameters"] == more
    assert experts.temporary["activations, feed-forward"] == 0
    # An expert keeps as much as a feed-forward layer, plus input, output and the router's logits.
    kept = experts.temporary["activations, experts"] - dense.temporary["activations, feed-forward"]
    assert kept == 2 * 4 * 4096 * (2 * 1024 * 2 + 8 * 4 + 8)
    found = dict(savings.savings(config_of("373m_moe", small), data_axis=1))
    assert found["--model.experts.num_experts 4"] > 0


def test_savings_are_real_settings_and_the_most_useful_comes_first():
    small = "--model.num_layers 2 --model.memory.layers 1"
    config = config_of("373m_memory_plus_1m", small)
    found = savings.savings(config, data_axis=1)
    before = memory_plan.plan(config, data_axis=1).total
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    assert {"--train.remat block", "--train.grad_accum_steps 2", "--model.memory.num_keys 724"} <= {
        name for name, _ in found
    }
    for change, saved in found[:2]:
        changed = config_of("373m_memory_plus_1m", f"{small} {change}")
        assert memory_plan.plan(changed, data_axis=1).total == before - saved
        assert saved > 0


def test_the_norm_of_the_tables_gradients_is_counted_and_can_be_saved():
    small = "--model.num_layers 2 --model.memory.layers 1 --data.batch_size 1 --mesh.row_grad_reduce all_reduce"
    joint = config_of("373m_memory_plus_1m", f"{small} --optim.clip_tables joint")
    found = memory_plan.plan(joint, data_axis=1)
    assert found.moment == "the update"
    assert found.temporary["norm of the tables' gradients"] == 2**20 * 4  # one number per row
    null = memory_plan.plan(config_of("373m_memory_plus_1m", small), data_axis=1).total
    assert 2**20 * 4 <= found.total - null <= 2**20 * 5
    assert ("optim.clip_tables", None) in savings._changes(joint, 1)


def test_bytes_of_a_compiled_function_are_its_arrays():
    double = jax.jit(lambda x, y: (2 * x, y.sum()), donate_argnums=0)
    compiled = double.lower(jnp.zeros((64, 16)), jnp.zeros(1024)).compile()
    # The first output reuses the donated argument, so only the sum is new; temporaries are a few bytes.
    expected = 4 * (64 * 16 + 1024 + 1)
    assert expected <= memory_plan.compiled_bytes(compiled) < expected + 256


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), True),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), False),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_only_a_device_without_memory_is_out_of_memory(error, expected):
    assert savings.is_out_of_memory(error) is expected


def test_explanation_has_the_plan_and_three_changes():
    config = config_of("373m_dense", "--model.num_layers 2")
    text = savings.explain_out_of_memory(config, data_axis=1, limit=80 * 10**9)
    assert "a device has 80.00 GB" in text
    assert math.isclose(float(text.split("predicted bytes per device")[1].split()[0]), 3.5, rel_tol=0.1)
    changes = text.split("what would need less:")[1].strip().splitlines()
    assert len(changes) == 3
    assert all(change.strip().startswith("--") and change.endswith(" less") for change in changes)
