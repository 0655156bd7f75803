"""The bench of several devices: its cases, its summary of rows, and one case on two devices."""

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
def bench(monkeypatch):
    """Imports a module of the bench."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def cases_of(bench):
    """cases_of(counts): the cases for these numbers of devices."""
    bench("train_step")
    make = lambda name, preset, *settings, **more: {"case": name, "preset": preset, "settings": settings} | more
    return lambda counts, small=False: bench("devices").cases_of(make, counts, 4, small=small)


def setting(case, name):
    """The value of a case's setting; the last one given counts."""
    return dict(zip(case["settings"][::2], case["settings"][1::2], strict=True))[name]


@pytest.mark.parametrize("small", [False, True])
def test_every_layout_has_a_case_with_the_same_tokens_for_each_device(cases_of, small):
    cases = cases_of([1, 2, 4, 8], small)
    assert len({case["case"] for case in cases}) == len(cases)
    meshes = {}
    for case in cases:
        mesh = tuple(int(setting(case, f"--mesh.{axis}")) for axis in ("data", "memory", "tensor"))
        assert mesh[0] * mesh[1] * mesh[2] == case["devices"]
        assert int(setting(case, "--data.batch_size")) == 4 * case["devices"]
        meshes.setdefault((case["what"], case["size"], case["slots"]), set()).add(mesh)
    tables = sorted(slots for what, size, slots in meshes if (what, size) == ("memory layer", "373m"))
    assert tables == ([256, 1024] if small else [1 << 20, 1 << 24, 1 << 26])
    every = {
        (1, 1, 1),
        (1, 2, 1),
        (2, 1, 1),
        (1, 4, 1),
        (4, 1, 1),
        (2, 2, 1),
        (1, 8, 1),
        (8, 1, 1),
        (4, 2, 1),
        (2, 4, 1),
    }
    replicas = {(2, 1, 1), (4, 1, 1), (8, 1, 1)}
    for what in ("memory layer", "whole step"):
        assert meshes[what, "373m", tables[0]] == every
        assert meshes[what, "373m", tables[1]] == every - replicas


@pytest.mark.slow
def test_every_case_of_eight_devices_is_a_valid_run(cases_of):
    for case in cases_of([8]):
        config = load(RunConfig, pathlib.Path(case["preset"]), case["settings"])
        assert config.mesh.data_axis(8) * config.mesh.devices_per_replica == 8, case["case"]


def test_rows_are_set_against_one_device_and_the_smallest_table(bench):
    def row(devices, slots, ms, rate):
        mesh = f"data 1 x memory {devices}"
        return {
            "part": "devices", "what": "whole step", "size": "373m", "slots": slots, "mesh": mesh,
            "devices": devices, "ms": ms, "tokens/s": rate,
        }  # fmt: skip

    rows = [
        row(8, 100, 12.0, 720),
        row(1, 100, 10.0, 100),
        row(8, 400, 15.0, 640),
        {"part": "devices", "what": "whole step", "size": "373m", "slots": 100, "mesh": "x", "note": "out of memory"},
        {"part": "devices", "case": "of an older record", "tokens/s": 3},
    ]
    bench("devices").compare(rows)
    assert [row.get("tokens/s per GPU") for row in rows] == [90, 100, 80, None, None]
    assert [row.get("of one GPU") for row in rows] == [0.9, 1.0, None, None, None]
    assert [row.get("of smallest table") for row in rows] == [1.0, 1.0, 1.25, None, None]


@pytest.mark.slow
def test_a_layer_on_two_devices_is_measured_once(tmp_path):
    case = "memory layer, 373m, 256 slots, data 1 x memory 2"
    command = [sys.executable, str(BENCH / "train_step.py"), "--small", "--only", "devices", "--devices", "2"]
    command += ["--cases", case, "--out", str(tmp_path), "--stem", "record", "--resume"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    run = lambda: subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert f"| devices | {case} |" in run().stdout
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert "note" not in row, row
    assert (row["case"], row["devices"], row["of smallest table"]) == (case, 2, 1.0)
    assert any("all" in operation["operation"] for operation in row["profile"])
    assert case not in run().stdout
