"""The search for settings that fit the memory of a device."""

import pytest

from memjax import train
from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.training.plan.memory import plan
from memjax.training.plan.report import describe_fit
from memjax.training.plan.search import USABLE, search
from memjax.training.program import TrainProgram

SETTINGS = ["--model.dtype", "bfloat16", "--model.memory.table_dtype", "bfloat16", "--data.batch_size", "64"]
CONFIG = load(RunConfig, None, SETTINGS)
NEEDED = plan(CONFIG, data_axis=1).total


def test_a_run_that_fits_as_it_is_is_not_changed():
    found = search(CONFIG, device_bytes=2 * NEEDED, devices=1)
    assert found is not None
    assert found.changes == {}
    assert found.config.mesh.data == 1
    assert found.plan.total == NEEDED


@pytest.mark.parametrize(
    ("batch", "share"),
    [
        (64, 0.5),
        pytest.param(64, 0.2, marks=pytest.mark.slow),
        pytest.param(48, 0.4, marks=pytest.mark.slow),
        (3, 0.3),
        (3, 1.0),
    ],
)
def test_the_settings_found_fit_with_the_fewest_micro_batches(batch, share):
    settings = [*SETTINGS, "--data.batch_size", str(batch)]
    config = load(RunConfig, None, settings)
    device_bytes = int(share * NEEDED)
    found = search(config, device_bytes=device_bytes, devices=1)
    assert found is not None
    assert found.plan.total <= USABLE * device_bytes
    words = [word for name, value in found.changes.items() for word in (f"--{name}", str(value))]
    assert plan(load(RunConfig, None, [*settings, *words]), data_axis=1).total == found.plan.total
    size, steps = found.config.data.batch_size, found.config.train.grad_accum_steps
    for fewer in (fewer for fewer in range(1, steps) if size % fewer == 0):
        again = load(RunConfig, None, [*settings, *words, "--train.grad_accum_steps", str(fewer)])
        assert plan(again, data_axis=1).total > USABLE * device_bytes


def test_a_small_batch_grows_to_a_sequence_a_device_and_says_so():
    config = load(RunConfig, None, [*SETTINGS, "--data.batch_size", "4"])
    found = search(config, device_bytes=NEEDED, devices=8)
    assert found is not None
    assert found.changes == {"data.batch_size": 8}
    assert "the batch is larger; the same number of tokens takes --train.steps 375" in describe_fit(config, found, 1, 8)


def test_a_requested_mesh_is_kept_or_refused():
    asked = lambda *words: load(RunConfig, None, [*SETTINGS, "--model.memory.value_dim", "512", *words])
    found = search(asked("--mesh.data", "4"), device_bytes=4 * NEEDED, devices=8)
    assert found is not None
    assert found.changes == {"mesh.memory": 2}
    for words, devices in ((["--mesh.tensor", "2"], 1), (["--mesh.tensor", "2"], 3), (["--mesh.data", "4"], 6)):
        with pytest.raises(ConfigError, match=f"devices={devices} must be a multiple of mesh"):
            search(asked(*words), device_bytes=NEEDED, devices=devices)


def test_a_table_that_is_too_large_for_a_device_is_shared():
    config = load(RunConfig, None, [*SETTINGS, "--model.memory.num_keys", "1024", "--model.memory.value_dim", "512"])
    table = 1024**2 * 512 * 2
    found = search(config, device_bytes=table, devices=2)
    assert found is not None
    assert found.changes["mesh.memory"] == 2
    assert found.config.mesh.data == 1


def test_it_is_reported_if_nothing_fits():
    assert search(CONFIG, device_bytes=1_000_000, devices=2) is None
    assert describe_fit(CONFIG, None, 1_000_000, 2).startswith("nothing fits on 2 x 1.00 MB")
    assert train.main(["--dry_run", "--device_gb", "0.001"]) == 7


def test_the_command_prints_the_settings_and_the_time(capsys):
    assert train.main(["--dry_run", *SETTINGS, "--device_gb", str(0.6 * NEEDED / 1e9)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits on 1 x ")
    assert "--train.grad_accum_steps" in out or "--train.remat" in out
    assert "days for 750 steps on 1 x NVIDIA H100" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device_gb", "many"], "device_gb=many must be the memory of a device in GB"),
        (["--device-gb", "0"], "device_gb=0 must be"),
        (["--device_gb", "0.0"], "device_gb=0.0 must be"),
        (["--device_gb", "9" * 400], "device_gb=9999"),
        (["--device_gb", "--devices", "2"], "device_gb= must be"),
        (["--devices", "8"], "device_gb= must be"),
        (["--device_gb", "80", "--devices", "0"], "devices=0 must be a whole number"),
    ],
)
def test_invalid_numbers_are_refused(words, problem, capsys):
    assert train.main(["--dry_run", *words]) == 2
    assert problem in capsys.readouterr().err


def test_planning_needs_a_dry_run(capsys):
    assert train.main(["--device_gb", "80"]) == 2
    assert "device_gb=80 is for planning; add --dry_run" in capsys.readouterr().err


def test_the_state_is_computed_once_for_all_plans(monkeypatch):
    described, begin = [], TrainProgram.begin
    monkeypatch.setattr(TrainProgram, "begin", lambda *arguments: described.append(1) or begin(*arguments))
    assert search(CONFIG, device_bytes=NEEDED, devices=1) is not None
    assert len(described) == 1
