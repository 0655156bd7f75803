"""The campaigns that damage runs and files can be run by anyone, and count what goes wrong."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

TRUST = pathlib.Path(__file__).parents[1] / "experiments/trust"
sys.path.insert(0, str(TRUST))

import families  # noqa: E402
import fuzz  # noqa: E402
import lab  # noqa: E402
import promises  # noqa: E402

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
    done = campaigns("--only", "gz,lines", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "trust.json").read_text())
    assert [case["tried"] for case in result["cases"]] == [12, 12]
    assert done.stdout.count("| 12 | 0 | 0 | 0 | 0 | 0 |") == 2
    assert "or is counted | lines 12, gz 12, xz 0, bz 0" in done.stdout
    again = campaigns("--report", str(tmp_path / "trust.json"))
    assert again.stdout == (tmp_path / "trust.md").read_text()


def test_everything_that_backs_a_guarantee_exists():
    assert [f"R{number}" for number in range(1, 31)] == list(promises.PROMISES)
    for _, where in promises.PROMISES.values():
        for word in where.split():
            file, _, test = word.partition("::")
            assert word == promises.ON_GPU or word in run.CAMPAIGNS or (TRUST.parents[1] / file).is_file(), word
            assert not test or f"def {test}(" in (TRUST.parents[1] / file).read_text(), word


def test_the_kept_results_have_no_fault_and_their_table_is_that_of_the_page():
    results = [path for path in sorted((TRUST / "results").glob("*.json")) if not path.stem.startswith(promises.ON_GPU)]
    kept = [json.loads(path.read_text()) for path in results]
    assert not [case for result in kept for case in result.get("cases", ()) if case["notes"]]
    assert not [name for result in kept for name, test in result.get("tests", {}).items() if test["failed"]]
    assert (TRUST / "results/trust.md").read_text() == run.read_results(results) + "\n"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A folder for the files of a family, inside a temporary working directory."""
    monkeypatch.setenv("MEMJAX_COMPILE_CACHE", str(tmp_path / "compiled"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "family"
    folder.mkdir()
    return folder


HERE = (*families.RECORDS, "settings", "tokenizers", "official", "facts")
"""Families that are tested in this process."""


@pytest.mark.parametrize("name", HERE)
def test_damaged_files_of_every_format_are_read_or_refused_in_words(watched, name):
    for what, attempt in fuzz.attempts(families.FAMILIES[name], 1000, 20, watched):
        assert attempt() == [], what


def test_what_a_reader_does_outside_of_its_folder_is_found(watched):
    def make(folder):
        (folder / "a.json").write_text("{}")
        return fuzz.Family([folder / "a.json"], lambda: subprocess.run(["true"]) and (folder / "../b").write_text("x"))

    ((_, attempt),) = fuzz.attempts(make, 0, 1, watched)
    first, second = (text for _, text in attempt())
    assert first.startswith("subprocess.Popen")
    assert second.startswith("open")
    assert second.endswith("b'")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_case_of_every_campaign_finds_nothing(tmp_path):
    # tests/inference/test_server.py covers the requests to the server.
    names = [name for name in run.CAMPAIGNS if name not in (*HERE, "http")]
    done = campaigns("--only", ",".join(names), "--jobs", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "trust.json").read_text())
    assert {case["campaign"] for case in result["cases"]} == set(names)
