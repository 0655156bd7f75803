"""Old names are refused with a hint at the new one, except in files written by runs of earlier versions."""

import dataclasses

import pytest

from memjax.config.devices import MeshConfig
from memjax.config.load import load
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.renamed import RENAMED, RENAMED_VALUES, new_name, upgraded
from memjax.config.run import RunConfig
from memjax.config.schema import walk
from memjax.errors import ConfigError

KNOWN = {".".join(path) for path, _ in walk(RunConfig)}
OLD = """
model:
  head_norm: true
  num_layers: 4
  memory: {layers: [0], share: false, placement: beside}
  experts: {layers: [3], capacity: 2.0, balance_weight: 0.5, z_weight: 0.25, routing: expert_choice}
  expert_lookup: {layers: [2], share: false}
optim: {clip: 0.5}
mesh: {row_exchange: factored}
processes: {silence_timeout: 60}
train: {accumulate: 4}
"""


def test_every_new_name_is_a_setting_and_no_old_one_is():
    for old in RENAMED:
        assert old not in KNOWN
        assert new_name(old) in KNOWN
        assert new_name(new_name(old)) == new_name(old)
    assert set(RENAMED_VALUES) <= KNOWN
    assert new_name("model.expert_lookup.share") == "model.peer.shared_table"
    assert new_name("model.expert_lookups") == "model.expert_lookups"


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(old):
    with pytest.raises(ConfigError, match=rf"command line: {old} is now {new_name(old)}"):
        load(RunConfig, None, [f"--{old}", "1"])


def test_old_names_in_a_file_are_refused_with_their_lines_and_old_values_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OLD + "eval: {every: null}\n")
    with pytest.raises(ConfigError) as error:
        load(RunConfig, path)
    assert f"{path}:3: model.head_norm is now model.qk_norm" in error.value.problems
    assert f"{path}:7: model.expert_lookup is now model.peer" in error.value.problems
    with pytest.raises(ConfigError, match="it is now 'parallel'"):
        load(RunConfig, None, ["--model.memory.placement", "beside"])
    with pytest.raises(ConfigError, match=r"model\.qk_norm=true must be .*it is now 'per_head'"):
        load(RunConfig, None, ["--model.qk_norm", "true"])


@pytest.mark.usefixtures("as_users_call")
def test_old_values_from_python_are_refused_with_the_new_ones_too():
    with pytest.raises(ValueError, match=r"qk_norm=True is unknown; known: .*; it is now 'per_head'"):
        ModelConfig(qk_norm=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"placement='beside' is unknown; known: .*; it is now 'parallel'"):
        MemoryConfig(placement="beside")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"row_grad_reduce='dense' is unknown; known: .*; it is now 'all_reduce'"):
        MeshConfig(row_grad_reduce="dense")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"qk_norm='head' is unknown; known: none, per_head, all_heads$"):
        ModelConfig(qk_norm="head")  # pyright: ignore[reportArgumentType]


def test_the_settings_of_an_older_run_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text(OLD)
    (tmp_path / "metrics.jsonl").touch()
    config = load(RunConfig, tmp_path / "config.yaml")
    model = config.model
    assert model.memory is not None
    assert model.experts is not None
    assert model.peer is not None
    assert (model.qk_norm, model.memory.shared_table, model.memory.placement) == ("per_head", False, "parallel")
    assert (model.experts.capacity_factor, model.experts.aux_loss_weight, model.experts.z_loss_weight) == (2, 0.5, 0.25)
    assert (model.peer.layers, model.peer.shared_table) == ((2,), False)
    assert (config.optim.max_grad_norm, config.mesh.row_grad_reduce) == (0.5, "all_gather")
    assert (config.processes.heartbeat_timeout, config.train.grad_accum_steps) == (60, 4)


def test_current_settings_are_unchanged():
    config = dataclasses.asdict(RunConfig())
    assert upgraded(config) == config
    wrong = {"mesh": {"row_grad_reduce": ["factored"]}}  # reported later, by the check of the settings
    assert upgraded(wrong) == wrong
    assert upgraded({"model": {"memory": None, "expert_lookup": None}}) == {"model": {"memory": None, "peer": None}}
