"""Grids of runs: how arguments are read, what is refused before the first run, and how processes are handled."""

import json
import pathlib
import signal
import sys
import threading
import time

import pytest

from memjax import sweep as command
from memjax.config.load import load, to_yaml
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.training import sweep

PROGRAM = """
import json, pathlib, sys, time
settings = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(settings["--run.dir"])
folder.mkdir(parents=True, exist_ok=True)
time.sleep(float(settings.get("--sleep", 0)))
loss = float(settings["--optim.lr"])
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": loss, "train/tokens": 10}) + "\\n")
sys.exit(5 if loss > 1 else 0)
"""


@pytest.fixture
def program(tmp_path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def test_a_grid_is_every_combination_named_by_what_varies():
    grid = sweep.parse_grid(["optim.lr=1e-3,3e-3", "model.memory.layers=[1, 3],[2]"])
    assert grid == {"optim.lr": ["1e-3", "3e-3"], "model.memory.layers": ["[1, 3]", "[2]"]}
    found = sweep.points(grid)
    assert len(found) == 4
    assert found[0].name == "lr=1e-3,layers=_1__3_"
    assert found[0].arguments == ("--optim.lr", "1e-3", "--model.memory.layers", "[1, 3]")


def test_settings_with_the_same_last_part_keep_their_whole_names():
    assert sweep.points({"optim.lr": ["1"], "optim.table.lr": ["2"]})[0].name == "optim.lr=1,optim.table.lr=2"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "grid is missing"),
        (["optim.lr"], "grid=optim.lr must be SETTING=VALUE,VALUE"),
        (["optim.lr="], "grid=optim.lr= must be SETTING=VALUE,VALUE"),
        (["optim.lr=1", "optim.lr=2"], "gives values for optim.lr a second time"),
        (["optim.lr=1,1"], "grid=optim.lr=1,1 repeats a value"),
        (["model.memory.layers=[1,2,[3]"], "must be SETTING=VALUE"),
        (["data.path=x{y,z"], "must be SETTING=VALUE"),
        (["run.mirror=gs://a,gs://b"], "the sweep names the folders of its runs itself"),
        (["run.dir=a,b"], "the sweep names the folders of its runs itself"),
    ],
)
def test_invalid_grids_are_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        sweep.parse_grid(words)


def test_all_combinations_are_checked_before_the_first_run(tmp_path, capsys):
    argv = ["--run.dir", str(tmp_path / "runs"), "--grid", "optim.lr=1e-3,fast", "--grid=model.memory.top_k=0,4"]
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert "optim.lr='fast' must be a number" in error
    assert "model.memory.top_k=0" in error
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_a_run_cannot_hold_a_sweep(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {dim: 64}")
    assert command.main(["--run.dir", str(tmp_path), "--grid", "optim.lr=1e-3"]) == 2
    assert "is the folder of a run; name another --run.dir for the sweep" in capsys.readouterr().err
    assert command.main([str(tmp_path), "--grid", "optim.lr=1e-3"]) == 2
    assert "a sweep starts from a YAML file or a preset" in capsys.readouterr().err


def test_the_config_may_follow_settings_that_are_addresses(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text("train: {steps: 5}")
    settings = [
        "--data.source",
        "jsonl",
        "--data.path",
        "memory://bucket/texts.jsonl",
        "--run.dir",
        str(tmp_path / "runs"),
    ]
    argv = [*settings, str(tmp_path / "small.yaml"), "--grid", "optim.lr=1e-3,fast"]
    assert command.main(argv) == 2
    assert capsys.readouterr().err.strip().endswith("optim.lr='fast' must be a number")


def test_values_that_folder_names_cannot_distinguish_get_numbers():
    assert [point.name for point in sweep.points({"data.path": ["a/b", "a_b", "c"]})] == [
        "path=a_b-1",
        "path=a_b-2",
        "path=c",
    ]


def test_a_numbered_name_does_not_collide_with_another_run():
    names = [point.name for point in sweep.points({"data.path": ["a/b", "a_b", "a_b-1"]})]
    assert names == ["path=a_b-2", "path=a_b-3", "path=a_b-1"]


def test_long_values_are_shortened_to_valid_file_names(tmp_path):
    for values in (
        ["é" * 300 + end for end in "abc"],
        ["a" * length for length in (234, 235, 236, 245, 246, 250)],
        *(["a" * length + end for end in "/:"] for length in (234, 235, 244, 245, 246, 300)),
    ):
        names = [point.name for point in sweep.points({"data.path": values})]
        assert len(set(names)) == len(values)
        for name in names:
            (tmp_path / f"{name}.log").touch()


def test_a_comparison_that_cannot_be_made_does_not_hide_how_the_sweep_ended(tmp_path, capsys):
    for name, rows in (("lr=1", ""), ("lr=2", '{"step": 1, "train/loss": 2.0}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(rows)
    command._compare(tmp_path, [tmp_path / "lr=1"])
    assert capsys.readouterr().out == ""
    command._compare(tmp_path, [tmp_path / "lr=1", tmp_path / "lr=2"])
    assert "lr=2" in capsys.readouterr().out
    (tmp_path / "comparison.png").unlink()
    (tmp_path / "comparison.png").mkdir()
    command._compare(tmp_path, [tmp_path / "lr=2"])
    assert "the runs are not compared" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "two", "-1", "9" * 5000])
def test_jobs_is_a_number_of_runs(jobs, capsys):
    assert command.main(["--grid", "optim.lr=1e-3", "--jobs", jobs]) == 2
    assert f"jobs={jobs} must be a whole number of runs at a time" in capsys.readouterr().err


def test_every_combination_runs_and_the_first_failure_is_the_exit_code(program, tmp_path, capsys):
    grid = sweep.points({"optim.lr": ["0.5", "2", "0.25"]})
    code = sweep.Sweep(program, tmp_path / "runs", grid, jobs=2).run()
    assert code == 5
    losses = {path.parent.name: json.loads(path.read_text())["train/loss"] for path in tmp_path.glob("runs/*/*.jsonl")}
    assert losses == {"lr=0.5": 0.5, "lr=2": 2.0, "lr=0.25": 0.25}
    out = capsys.readouterr().out
    assert "[3/3] lr=0.25: started, output in" in out
    assert "lr=2: not a number after 0:0" in out


def test_each_run_has_its_own_mirror(program, tmp_path):
    pathlib.Path(program[1]).write_text(
        "import pathlib, sys\n"
        "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "pathlib.Path(words['--run.mirror']).mkdir(parents=True)\n"
    )
    grid = sweep.points({"optim.lr": ["0.5", "0.25"]})
    assert sweep.Sweep(program, tmp_path / "runs", grid, jobs=2, mirror=f"{tmp_path}/mirror/").run() == 0
    assert sorted(path.name for path in (tmp_path / "mirror").iterdir()) == ["lr=0.25", "lr=0.5"]


def test_a_signal_is_passed_to_the_runs_and_no_more_start(program, tmp_path, capsys):
    grid = sweep.points({"optim.lr": ["0.5", "0.25"]})
    started = time.monotonic()

    def ask_once_the_first_has_started():
        while not (tmp_path / "runs" / "lr=0.5").exists() and time.monotonic() - started < 30:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=ask_once_the_first_has_started).start()
    assert sweep.Sweep([*program, "--sleep", "60"], tmp_path / "runs", grid, jobs=1).run() == 75
    assert time.monotonic() - started < 30
    out = capsys.readouterr().out
    assert "lr=0.25" not in out
    assert out.endswith("SIGTERM: stopped; the same command resumes\n")


def test_gpus_are_dealt_out_to_jobs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert [sweep._devices(slot, 2) for slot in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    assert sweep._devices(3, 4) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert sweep._devices(0, 1) == {}


def test_a_finished_run_is_not_started_again_and_a_changed_or_mirrored_one_is(tmp_path):
    grid = sweep.points({"optim.lr": ["0.5", "0.25", "0.125"]})
    for point in grid:
        config = load(RunConfig, None, [*point.arguments, "--run.dir", str(tmp_path / point.name)])
        (tmp_path / point.name).mkdir()
        (tmp_path / point.name / "config.yaml").write_text(to_yaml(config))
        (tmp_path / point.name / "summary.json").write_text(f'{{"steps": {config.train.steps}}}')
    (tmp_path / "lr=0.25" / "summary.json").unlink()
    (tmp_path / "lr=0.125" / "config.yaml").write_text("optim: {lr: 0.126}")
    waiting = lambda *settings: [point.name for point in sweep.unfinished(None, settings, tmp_path, grid)]
    assert waiting() == ["lr=0.25", "lr=0.125"]
    (tmp_path / "lr=0.125" / "config.yaml").write_text("optim: {lr:")
    assert waiting() == ["lr=0.25", "lr=0.125"]
    for setting in ("--train.steps=9999", "--optim.weight_decay=0.3", f"--run.mirror={tmp_path / 'mirror'}"):
        assert waiting(setting) == ["lr=0.5", "lr=0.25", "lr=0.125"]


@pytest.mark.slow
def test_a_sweep_trains_compares_and_is_resumed(tmp_path, capsys):
    tiny = ["--train.steps", "2", "--data.biographies.num_people", "8", "--eval.recall_people", "2"]
    tiny += ["--model.dim", "32", "--model.num_layers", "1", "--model.memory.layers", "0", "--log.tensorboard", "false"]
    argv = ["quickstart", *tiny, "--run.dir", str(tmp_path), "--grid", "model.memory.num_keys=8,16"]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("num_keys=")][-2:] == [
        ["num_keys=8", "8"],
        ["num_keys=16", "16"],
    ]
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    before = {path: path.read_bytes() for path in pathlib.Path(tmp_path).glob("*/metrics.jsonl")}
    assert len(before) == 2
    assert command.main(argv) == 0
    assert {path: path.read_bytes() for path in before} == before
    out = capsys.readouterr().out
    assert out.startswith("2 of 2 runs are already finished\n\n")
    assert "started" not in out
