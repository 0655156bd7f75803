"""What a dry run reports about the reduction of row gradients."""

import pathlib

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.training.plan.row_grad_reduce import describe, plan_reduce

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
GPU = ["--model.dtype", "bfloat16", "--model.memory.table_dtype", "bfloat16"]


def config_of(*settings: str) -> RunConfig:
    return load(RunConfig, CONFIGS / "8b_memory_plus_16m.yaml", [*GPU, *settings])


def test_the_largest_preset_on_64_devices_is_reduced():
    planned = plan_reduce(config_of(), data_axis=8)
    assert planned is not None
    assert planned.chosen == "all_reduce"
    # Three layers of 2048 x 4096 tokens, each with 128 picks of 8 bytes and 512 columns of 2; 7 of 8 parts are remote.
    assert planned.bytes["all_gather"].received == 3 * 2048 * 4096 * (128 * 8 + 512 * 2) * 7 // 8
    assert planned.bytes["all_reduce"].received == 2 * 4096**2 * (512 + 1) * 4 * 7 // 8
    assert describe(config_of(), data_axis=8).splitlines() == [
        "row gradients over data     all_reduce (mesh.row_grad_reduce: auto)",
        "  all_gather                45.10 GB received by each device, 154.62 GB held",
        "  all_reduce                60.25 GB received by each device, 38.99 GB held",
    ]


def test_a_small_batch_is_gathered_and_a_model_without_rows_says_nothing():
    small = config_of("--data.batch_size", "64")
    assert describe(small, data_axis=8).startswith("row gradients over data     all_gather")
    dense = load(RunConfig, CONFIGS / "8b_dense.yaml")
    assert describe(dense, data_axis=8) == ""
    assert plan_reduce(config_of("--optim.table.optimizer", "dense_sgd"), data_axis=8) is None
