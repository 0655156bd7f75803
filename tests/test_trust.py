"""The campaigns against runs and what memjax reads can be run by strangers, and count what goes wrong."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

TRUST = pathlib.Path(__file__).parents[1] / "experiments/trust"
sys.path.insert(0, str(TRUST))

import lab  # noqa: E402

_spec = importlib.util.spec_from_file_location("trust_run", TRUST / "run.py")
assert _spec is not None
assert _spec.loader is not None
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


def campaigns(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRUST / "run.py"), "--small", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_faults_are_counted_and_a_process_that_stays_is_ended(tmp_path):
    case, here = lab.Case("kills", "one", print, 0), lab.Lab(tmp_path / "lab", patience=0.5, workers=0)
    run = lambda code: here.end(here.start([sys.executable, "-c", code]))
    case.check(run("import time; time.sleep(60)"), [0], "stays")
    here.patience = 60
    case.check(run("raise OSError"), [1], "a traceback")
    case.check(run("raise SystemExit(3)"), [0, 2], "another code")
    assert (case.hung, case.tracebacks, case.other, case.faults) == (1, 1, 1, 3)
    assert case.check(run("print('well')"), [0], "right")


def test_a_run_that_differs_from_the_undisturbed_one_is_found(tmp_path):
    here = lab.Lab(tmp_path / "lab", patience=1, workers=0)
    here.repeats, here.rows, here.digests = True, [{"step": 1, "train/loss": 1.0}], {"a": 1}
    run = tmp_path / "run"
    digests = run / "checkpoints" / str(lab.STEPS) / "digests/metadata"
    digests.parent.mkdir(parents=True)
    found = {}
    for name, rows, arrays in (
        ("equal", [{"step": 1, "train/loss": 1.0, "throughput/step_seconds": 3.0}], {"a": 1}),
        ("a row less", [], {"a": 1}),
        ("another loss", [{"step": 1, "train/loss": 2.0}], {"a": 1}),
        ("other arrays", [{"step": 1, "train/loss": 1.0}], {"a": 2}),
    ):
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        digests.write_text(json.dumps({"index": {"arrays": arrays}, "digest": ""}))
        case = lab.Case("kills", name, print, 0)
        here.compare(case, run, name)
        found[name] = (case.lost, case.wrong)
    assert found == {"equal": (0, 0), "a row less": (1, 0), "another loss": (0, 1), "other arrays": (0, 1)}


def test_what_needs_no_run_is_tried_in_seconds(tmp_path):
    done = campaigns("--only", "data", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "trust.json").read_text())
    assert sum(case["tried"] for case in result["cases"]) == 9
    assert "| 9 | 0 | 0 | 0 | 0 | 0 |" in done.stdout
    assert (
        "| R16 | damaged data is an error that names the place, or is counted | data: 9 tried, 0 faults |"
        in done.stdout
    )
    again = campaigns("--report", str(tmp_path / "trust.json"))
    assert again.stdout == (tmp_path / "trust.md").read_text()


def test_what_holds_a_promise_is_there():
    for _, where in run.PROMISES.values():
        for word in where.split():
            assert word == "-" or word in run.CAMPAIGNS or (TRUST.parents[1] / word).is_file(), word


def test_the_kept_results_have_no_fault_and_their_table_is_that_of_the_page():
    results = [path for path in sorted((TRUST / "results").glob("*.json")) if path.stem != "bits-on-gpu"]
    done = [case for path in results for case in run.read_cases(path)]
    assert sum(case.faults for case in done) == 0
    told = run.report(done, [name for name in run.CAMPAIGNS if any(case.campaign == name for case in done)])
    assert (TRUST / "results/trust.md").read_text() == told + "\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_case_of_every_campaign_finds_nothing(tmp_path):
    done = campaigns("--jobs", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "trust.json").read_text())
    assert {case["campaign"] for case in result["cases"]} == {
        *("kills", "signals", "two", "patches", "flips", "disk", "data", "config", "sandbox")
    }
