"""Benches that start real commands: train, resume and evaluate with the largest tables, and a lost process."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from memjax.config.load import load
from memjax.config.run import RunConfig

BENCH = pathlib.Path(__file__).parents[1] / "experiments/bench"


@pytest.fixture
def bench(tmp_path):
    """Runs a script at its small size, and returns its rows and its output."""

    def run(name, *arguments, devices):
        places = ["--small", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, str(BENCH / f"{name}.py"), *places, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        record = tmp_path / f"{name.replace('_', '-')}-small.json"
        assert record.exists(), done.stderr
        return json.loads(record.read_text())["rows"], done

    return run


@pytest.mark.slow
def test_the_commands_of_the_full_sizes_are_valid(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    large, lost = importlib.import_module("large_tables"), importlib.import_module("lost_process")
    options = {"small": False, "runs": tmp_path, "out": tmp_path, "preset": "373m_memory_plus_1m"}
    commands = []
    monkeypatch.setattr(lost, "Command", lambda name, words, log, **environment: commands.append(words))
    lost.start(argparse.Namespace(**options, devices=4), tmp_path / "run", "lost")
    assert len(commands) == 2
    for preset in large.PRESETS:
        runner = large.Runner(preset, argparse.Namespace(**options, devices=8), 0)
        commands += [runner.settings(8, large.STEPS), runner.settings(4, 1000)]
    for preset, *settings in commands:
        config = load(RunConfig, pathlib.Path(preset), settings)
        assert config.data.batch_size == 32
        assert 8 % config.mesh.memory == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_large_table_is_trained_restored_on_another_mesh_and_read_from_host_memory(bench):
    words = ["--devices", "2", "--presets", "1.3b_memory_plus_64m"]
    rows, done = bench("large_tables", *words, devices=2)
    assert done.returncode == 0, rows
    train, resume, evaluate = rows
    assert train["last loss"] < train["first loss"] - 1
    assert (train["mesh"], resume["mesh"]) == ("data 1 x memory 2", "data 2 x memory 1")
    assert abs(resume["first loss"] - train["last loss"]) < 0.3
    assert evaluate["bits per byte"] == pytest.approx(evaluate["bits per byte, host"], rel=1e-3)
    again, done = bench("large_tables", *words, devices=2)
    assert again == rows
    assert "memjax.train" not in done.stderr, "finished work is not repeated"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_is_killed_ends_the_other_and_both_resume(bench):
    (row,), done = bench("lost_process", "--devices", "1", devices=1)
    assert done.returncode == 0, row
    assert row["seconds to end"] < 60
    assert row["resumed from"] == row["saved"] > 0
    assert row["stopped at"] > row["saved"]
    assert row["exit codes"] == [75, 75]
