"""Many runs at once: failures are reported and stop no others, results are reused, deadlines are kept."""

import json
import subprocess
import sys
import time

import pytest
from factlab import command, runs

# Responds like a worker: fails or dies if the family's name says so, and otherwise returns what a table needs.
WORKER = """
import json, sys, time
for line in sys.stdin:
    task = json.loads(line)
    if task["family"] == "dies":
        sys.exit(9)
    result = {"recall": 0.5, "stored_bits": 1000.0, "compile_seconds": 0.0, "tokens_per_second": 1.0}
    result["seed_given"], result["began"] = task["seed"], time.time()
    time.sleep(0.05)
    result["ended"] = time.time()
    print(json.dumps({"error": "on purpose"} if task["family"] == "fails" else {"result": result}), flush=True)
"""


@pytest.fixture
def started(monkeypatch):
    """The environment of each process that was started."""
    environments = []

    def start(environment, module):
        environments.append(environment)
        command = [sys.executable, "-c", WORKER]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(runs, "start", start)
    return environments


@pytest.fixture
def pool(started, tmp_path):
    return lambda results, deadline=None: runs.Pool(tmp_path / "out.json", results, jobs=2, deadline=deadline)


def a_run(family, seed=0, **options):
    facts = {"people": 3}
    return runs.Run(
        stage="full",
        family=family,
        config=f"{family}.yaml",
        lr=1e-3,
        table_lr=0.0,
        exposures=2,
        facts=facts,
        seed=seed,
        **options,
    )


def test_runs_that_fail_or_kill_their_process_are_named_and_the_others_go_on(pool, tmp_path):
    todo = [a_run("a"), a_run("fails"), a_run("b", 1), a_run("dies"), a_run("c", 2)]
    without = pool({}).run(todo)
    assert sorted(without) == sorted([todo[1].name, todo[3].name])
    written = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert {(row["family"], row["seed_given"]) for row in written} == {("a", 0), ("b", 1), ("c", 2)}


def test_what_has_a_result_is_not_run_again_and_files_are_merged(pool, tmp_path):
    first = a_run("a")
    pool({}).run([first])
    (tmp_path / "out.json").rename(tmp_path / "committed.json")
    results = runs.read_results(tmp_path / "out.json", tmp_path / "committed.json")
    assert pool(results).run([first, a_run("b")]) == []
    rows = runs.read_results(tmp_path / "out.json")
    assert [row["family"] for row in rows.values()] == ["a", "b"]
    assert rows[first.name] == json.loads((tmp_path / "committed.json").read_text())["runs"][0]


def test_nothing_is_started_that_would_end_after_the_deadline(pool, tmp_path):
    long, short = a_run("a", seconds=1000), a_run("b", seconds=1)
    assert pool({}, deadline=time.time() + 60).run([long, short]) == [long.name]
    assert [row["family"] for row in runs.read_results(tmp_path / "out.json").values()] == ["b"]


def test_guesses_are_corrected_by_what_other_runs_took(started, tmp_path):
    # The first run takes at least fifty times its estimate, so the second is expected to end after the deadline.
    quick, other = a_run("a", seconds=1e-3), a_run("b", 1, seconds=72.0)
    pool = runs.Pool(tmp_path / "out.json", {}, jobs=1, deadline=time.time() + 3600, keeps_order=True)
    assert pool.run([quick, other]) == [other.name]


def test_a_run_that_needs_a_gpu_to_itself_has_it_and_the_order_is_kept(started, tmp_path):
    todo = [a_run("a"), a_run("b"), a_run("alone", alone=True), a_run("c"), a_run("d"), a_run("last", alone=True)]
    out = tmp_path / "out.json"
    assert runs.Pool(out, {}, jobs=2, deadline=None, keeps_order=True).run(todo) == []
    rows = {row["family"]: row for row in runs.read_results(out).values()}
    for one in ("alone", "last"):
        others = [row for family, row in rows.items() if family != one]
        assert all(row["ended"] <= rows[one]["began"] or rows[one]["ended"] <= row["began"] for row in others)
    begins = [rows[family]["began"] for family in ("a", "alone", "c", "last")]
    assert begins == sorted(begins)


def test_stages_run_together_unless_one_is_awaited():
    together = lambda awaited: command._together(["grid", "full", "seeds"], awaited)
    assert together(None) == [["grid"], ["full"], ["seeds"]]
    assert together(("grid",)) == [["grid"], ["full", "seeds"]]


def test_runs_that_differ_in_anything_have_different_names():
    plain = a_run("a")
    others = [a_run("a", 1), a_run("b"), a_run("a", perfect_address=True), a_run("a", settings=("--model.dim", "8"))]
    others.append(a_run("a", without="gate_proj"))
    assert len({run.name for run in [plain, *others]}) == 6


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, 2, {"0", "1"}), ("3,5", 2, {"3", "5"}), (None, 1, {None}), ("3", 1, {None})],
)
def test_processes_are_spread_over_gpus(started, monkeypatch, tmp_path, visible, gpus, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runs.Pool(tmp_path / "out.json", {}, jobs=2, gpus=gpus, deadline=None).run([a_run(name) for name in "abcdefgh"])
    assert {environment.get("CUDA_VISIBLE_DEVICES") for environment in started} == expected


@pytest.mark.parametrize("gpus", [0, 3])
def test_gpus_without_runs_are_refused(tmp_path, gpus):
    with pytest.raises(SystemExit, match=rf"--gpus {gpus}: must be between 1 and --jobs 2"):
        runs.Pool(tmp_path / "out.json", {}, jobs=2, gpus=gpus, deadline=None)


def test_more_gpus_than_are_visible_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(SystemExit, match="--gpus 2: CUDA_VISIBLE_DEVICES=3 shows only 1"):
        runs.Pool(tmp_path / "out.json", {}, jobs=2, gpus=2, deadline=None)
