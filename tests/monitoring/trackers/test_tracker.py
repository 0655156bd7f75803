"""Trackers receive every step once, and no failure of theirs stops a run."""

import json
import math
import struct
import sys
import threading
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from limits import files_of_at_most
from memjax.config.log import LogConfig, TrackioConfig, WandbConfig
from memjax.config.run import RunConfig
from memjax.monitoring.trackers import tracker as tracker_module
from memjax.monitoring.trackers.start import close_trackers, make_trackers
from memjax.monitoring.trackers.tracker import Tracker

SERVICES = ["wandb", "trackio"]
STAGES = ["import", "init", "log", "finish"]


def config(name: str) -> RunConfig:
    wandb = WandbConfig(project="p") if name == "wandb" else None
    trackio = TrackioConfig(project="p") if name == "trackio" else None
    return RunConfig(log=LogConfig(tensorboard=False, wandb=wandb, trackio=trackio))


class FakeService(types.ModuleType):
    """A tracking library that records its calls, and raises at one stage."""

    def __init__(self, name: str, fails_at: str = "", error: BaseException | None = None):
        super().__init__(name)
        self.fails_at, self.error = fails_at, error
        self.starts, self.logged, self.finished = [], [], 0

    def fail(self, stage: str) -> None:
        if stage == self.fails_at:
            raise self.error or ValueError(f"no {stage} today")

    def init(self, **settings):
        self.fail("init")
        self.starts.append(settings)
        return types.SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, metrics, *, step):
        self.fail("log")
        self.logged.append((step, metrics))

    def finish(self):
        self.fail("finish")
        self.finished += 1


@pytest.fixture
def installed(monkeypatch):
    """installed(name, fails_at): replaces the library by a fake."""

    def install(name: str, fails_at: str = "", error: BaseException | None = None) -> FakeService:
        library = FakeService(name, fails_at, error)
        monkeypatch.setitem(sys.modules, name, library)
        if fails_at == "import":
            importer = tracker_module.importlib.import_module
            broken = lambda wanted: library.fail("import") if wanted == name else importer(wanted)
            monkeypatch.setattr(tracker_module.importlib, "import_module", broken)
        return library

    return install


def run(chosen: RunConfig, folder, steps, last_step: int = 0) -> None:
    started = make_trackers(chosen, folder, last_step=last_step)
    for step in steps:
        for tracker in started:
            tracker.write({"step": step, "train/loss": 1 / step, "nothing": None, "count": 3})
    close_trackers(started)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_every_step_and_the_settings(installed, tmp_path, name, capsys):
    library = installed(name)
    run(config(name), tmp_path / "", [1, 2, 3])
    assert library.logged == [(step, {"train/loss": 1 / step, "count": 3}) for step in (1, 2, 3)]
    assert library.finished == 1
    (start,) = library.starts
    assert (start["project"], start["name"]) == ("p", tmp_path.name)
    assert start["config"]["optim"]["table"]["beta2"] == 0.99
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", SERVICES)
def test_a_resumed_run_continues_as_the_same_run_and_sends_no_step_twice(installed, tmp_path, name):
    library = installed(name)
    run(config(name), tmp_path, [1, 2, 3, 4])
    run(config(name), tmp_path, [3, 4, 5], last_step=2)
    assert [step for step, _ in library.logged] == [1, 2, 3, 4, 5]
    first, second = library.starts
    assert second["resume"] == "allow"
    if name == "wandb":
        assert first["id"] == second["id"]
    else:
        assert first["resume"] == "never", "another folder's run may have the same name"


def test_a_start_without_a_step_gives_its_run_in_wandb_to_no_other(installed, tmp_path):
    library = installed("wandb")
    run(config("wandb"), tmp_path, [])
    run(config("wandb"), tmp_path, [1])
    first, second = library.starts
    assert first["id"] != second["id"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SERVICES)
def test_any_failure_is_reported_once_and_the_run_continues(installed, tmp_path, name, stage, capsys):
    library = installed(name, stage)
    run(config(name), tmp_path, [1, 2, 3])
    assert capsys.readouterr().err == f"log.{name}: ValueError: no {stage} today. The run continues without it.\n"
    assert len(library.logged) == (3 if stage == "finish" else 0)


def test_a_library_that_ends_the_process_ends_only_its_thread(installed, tmp_path, capsys):
    installed("wandb", "init", SystemExit("not logged in"))
    run(config("wandb"), tmp_path, [1])
    assert capsys.readouterr().err == "log.wandb: SystemExit: not logged in. The run continues without it.\n"


@pytest.mark.parametrize(
    ("name", "install"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboardX", "tensorboardX")]
)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(tmp_path, monkeypatch, capsys, name, install):
    importer = tracker_module.importlib.import_module

    def lacking(wanted):
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importer(wanted)

    monkeypatch.setattr(tracker_module.importlib, "import_module", lacking)
    chosen = RunConfig() if name == "tensorboardX" else config(name)
    run(chosen, tmp_path, [1, 2])
    setting = "tensorboard" if name == "tensorboardX" else name
    assert capsys.readouterr().err == (
        f"log.{setting}: {name} is not installed; get it with: pip install '{install}'. The run continues without it.\n"
    )


def test_a_service_that_never_answers_delays_nobody(capsys):
    answer = threading.Event()
    tracker = Tracker("log.slow", lambda: answer.wait(60) and None)  # pyright: ignore[reportArgumentType]
    started = time.monotonic()
    for step in range(1000):
        tracker.write({"step": step})
    close_trackers([tracker], seconds=0.05)
    assert time.monotonic() - started < 30
    assert capsys.readouterr().err == (
        "log.slow: it does not finish, so its last steps may be missing. The run continues without it.\n"
    )
    answer.set()


def test_a_service_that_falls_behind_is_dropped(monkeypatch, capsys):
    monkeypatch.setattr(tracker_module, "_MOST_WAITING", 3)
    answer = threading.Event()
    tracker = Tracker("log.slow", lambda: answer.wait(60) and None)  # pyright: ignore[reportArgumentType]
    for step in range(10):
        tracker.write({"step": step})
    answer.set()
    close_trackers([tracker])
    assert capsys.readouterr().err == "log.slow: it is 3 steps behind. The run continues without it.\n"


def shown_by_tensorboard(folder) -> list[tuple[int, str, float]]:
    """The events that TensorBoard shows: a session start hides earlier events of its own step and later ones."""
    kept = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                kept = [known for known in kept if known[0] < event.step]
            kept += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return kept


def test_tensorboard_shows_every_step_once_after_a_resumption(tmp_path):
    run(RunConfig(), tmp_path, [1, 2, 4])
    run(RunConfig(), tmp_path, [4, 5], last_step=2)
    run(RunConfig(), tmp_path, [1], last_step=0)
    assert shown_by_tensorboard(tmp_path / "tensorboard") == [(1, "train/loss", 1.0), (1, "count", 3.0)]
    run(RunConfig(), tmp_path, [2, 4], last_step=1)
    run(RunConfig(), tmp_path, [4, 5], last_step=2)
    losses = [(step, value) for step, tag, value in shown_by_tensorboard(tmp_path / "tensorboard") if tag != "count"]
    assert losses == [(1, 1.0), (2, 0.5), (4, 0.25), (5, pytest.approx(0.2))]


@pytest.mark.parametrize("name", ["tensorboard", *SERVICES])
def test_values_that_are_not_numbers_are_silently_left_out(installed, tmp_path, name, caplog):
    library = None if name == "tensorboard" else installed(name)
    started = make_trackers(RunConfig() if library is None else config(name), tmp_path, last_step=0)
    for tracker in started:
        tracker.write({"step": 1, "train/loss": 2.0, "data/rare/loss": math.nan, "norm": math.inf})
    close_trackers(started)
    found = shown_by_tensorboard(tmp_path / "tensorboard") if library is None else library.logged
    assert found == ([(1, "train/loss", 2.0)] if library is None else [(1, {"train/loss": 2.0})])
    assert not caplog.records


def test_a_full_disk_costs_one_line(tmp_path, capsys):
    started = time.monotonic()
    with files_of_at_most(4096):
        run(RunConfig(), tmp_path, range(1, 1000))
    error = capsys.readouterr().err
    assert error == "log.tensorboard: OSError: [Errno 27] File too large. The run continues without it.\n"
    assert time.monotonic() - started < 10


def test_only_requested_trackers_are_started(tmp_path):
    assert make_trackers(RunConfig(log=LogConfig(tensorboard=False)), tmp_path, last_step=0) == []
    assert list(tmp_path.iterdir()) == []


def test_whatever_resuming_needs_is_in_the_runs_folder(installed, tmp_path):
    installed("wandb")
    run(config("wandb"), tmp_path, [1, 2])
    notes = json.loads((tmp_path / "wandb.json").read_text())
    assert notes == {"id": notes["id"], "step": 2}
