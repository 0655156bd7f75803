"""The bench of whole steps runs, and adds to the record that is there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[1] / "experiments/bench/train_step.py"


@pytest.mark.slow
def test_predictions_are_set_beside_what_a_step_takes_and_the_record_keeps_other_cases(tmp_path):
    rows = [{"part": "dense", "case": "a case of another day"}, {"part": "planner", "case": "long rows, nothing again"}]
    (tmp_path / "record.json").write_text(json.dumps({"command": "another", "rows": rows}))
    command = [sys.executable, str(BENCH), "--small", "--only", "planner", "--out", str(tmp_path), "--stem", "record"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"].startswith("another ; python experiments/bench/train_step.py --small --only planner")
    kept, measured = record["rows"]
    assert kept == rows[0]
    assert measured["case"] == "long rows, nothing again"
    assert "note" not in measured, measured
    # XLA on a CPU takes up to three times what a GPU needs beside the state, and tells no peak.
    assert 0.3 < measured["predicted GB"] / measured["compiled GB"] < 1.5
    assert measured["peak GB"] is None
    assert "predicted / peak" in done.stdout.splitlines()[0]
    assert "long rows, nothing again" in done.stdout


@pytest.mark.slow
def test_generation_is_timed_by_batch_and_prompt_and_memory_is_set_against_dense(tmp_path):
    bench = BENCH.with_name("inference.py")
    command = [sys.executable, str(bench), "--small", "--only", "dense", "memory", "--out", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([*command, "--stem", "record"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(row["model"], row["batch"]) for row in record["rows"]] == [
        ("dense", 1),
        ("dense", 2),
        ("Memory+", 1),
        ("Memory+", 2),
    ]
    for row in record["rows"]:
        assert "note" not in row, row
        assert row["first token ms"] > 0 < row["ms a token"]
    assert record["rows"][2]["of dense"] == record["rows"][2]["ms a token"] / record["rows"][0]["ms a token"]
    assert record["commit"]
    assert record["versions"]["jax"]
    assert "| Memory+ | 2 | 16 |" in (tmp_path / "record.md").read_text()


@pytest.mark.slow
def test_the_server_loses_and_mixes_up_nothing_under_load(tmp_path):
    command = [
        sys.executable,
        str(BENCH.with_name("serving.py")),
        "--small",
        "--out",
        str(tmp_path),
        "--stem",
        "record",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert (row["clients"], row["lost"], row["all equal"]) == (4, 0, True)
    assert row["answers"] + row["hung up"] == 4 * 3
    assert row["first token p95 ms"] >= row["first token p50 ms"] > 0
    assert row["of engine"] == row["tokens/s"] / row["engine tokens/s"] > 0
