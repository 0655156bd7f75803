"""The metrics file, progress lines and clocks."""

import io
import json
import re
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from memjax.io.console import say
from memjax.monitoring import metrics
from memjax.monitoring import progress as progress_module
from memjax.monitoring.metrics import WINDOW, Metrics, MetricsFile, has_metrics, peak_flops, read_metrics
from memjax.monitoring.progress import ProgressLines, Stopwatch
from memjax.monitoring.units import clock


def write(path, steps, **last):
    with_file = MetricsFile(path, last_step=0)
    for step in steps:
        with_file.write({"step": step, "train/loss": 1 / step, **last})
    with_file.close()


def test_lines_after_the_restored_step_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    file = MetricsFile(path, last_step=5)
    assert read_metrics(path).steps.tolist() == [1, 2, 3, 4, 5]
    file.write({"step": 6, "train/loss": 0.5})
    file.close()
    assert read_metrics(path).steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_that_was_cut_off_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-9])
    assert read_metrics(path).steps.tolist() == [1, 2]
    file = MetricsFile(path, last_step=3)
    file.write({"step": 3, "train/loss": 0.25})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_long_file_is_opened_in_little_more_memory_than_it_takes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 2.5, "train/tokens": 1000 + step} | {f"metric {n}": n / 7 for n in range(8)}
            for step in range(1, 5001)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        MetricsFile(path, last_step=4990).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:4990]
    # Its lines and the output; parsed into rows they would take seven times the file's size.
    assert peak < 3 * size


def test_a_long_file_is_read_in_little_more_memory_than_it_takes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = range(1, 5001)
    path.write_text(
        "".join(json.dumps({"step": s} | {f"metric {n}": s / (n + 7) for n in range(11)}) + "\n" for s in steps)
    )
    Metrics([{"step": 1, "loss": 1.0}])  # NumPy imports some of its parts when they are first used
    tracemalloc.start()
    try:
        found = read_metrics(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.values("metric 3").tolist() == [step / 10 for step in steps]
    assert peak < 1.2 * path.stat().st_size  # rows of Python numbers would take ten times as much


def test_a_missing_file_has_no_rows(tmp_path):
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert (found.steps.tolist(), found.names(), found.last(), found.last_usage()) == ([], [], {}, {})
    assert not has_metrics(tmp_path / "metrics.jsonl")


def test_numbers_that_json_cannot_represent_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1], nan=float("nan"), infinite=float("inf"), count=3)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "train/loss": 1.0,
        "nan": None,
        "infinite": None,
        "count": 3,
    }


def test_rows_are_on_disk_after_a_flush(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    file.write({"step": 1})
    file.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (36_061.0, "10:01:01")]
)
def test_a_clock_counts_minutes_and_hours(seconds, text):
    assert clock(seconds) == text


def test_a_stopwatch_leaves_out_what_happens_while_it_is_paused(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    watch = Stopwatch()
    now = 103.0
    with watch.paused():
        now = 110.0
    now = 111.0
    assert watch.lap() == 4.0
    now = 111.5
    assert watch.lap() == 0.5


def row(step, seconds=1.0, **more):
    rates = {"train/loss": 2.5, "train/lr": 1e-3, "train/tokens": 1000}
    return {"step": step, "throughput/step_seconds": seconds} | rates | more


def test_progress_is_printed_at_once_then_now_and_then_and_at_the_end(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = ProgressLines(first_step=10, steps=15, every_seconds=50.0)
    # Time between the steps is spent on compilation and validation.
    for step, seconds, now in ((11, 2.0, 149.0), (12, 6.0, 160.0), (13, 1.0, 200.0), (15, 0.5, 201.0)):  # noqa: B007
        progress.show(row(step, seconds))
    stamped = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step .*", line) for line in stamped)
    lines = [line[21:] for line in stamped]
    assert [line.split()[1] for line in lines] == ["11/15", "13/15", "15/15"]
    # 2000 tokens in 7 s; the 2 steps left take 3 s each, whatever happened between steps or before a resumption.
    assert lines[1] == "step 13/15   87%  loss 2.5000  lr 1.0e-03  286 tokens/s  elapsed 1:40  left 0:06"
    assert lines[2].endswith("2,000 tokens/s  elapsed 1:41  left 0:00")


def shown(written: str) -> list[str]:
    """The lines that a terminal shows, without what was cleared."""
    return re.sub(r"[^\n]*\r\x1b\[K", "", written).split("\n")


def test_on_a_terminal_the_bar_stays_below_the_output_and_is_removed(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    progress = ProgressLines(first_step=0, steps=4, every_seconds=1e9)
    progress.show(row(1, 3.0))
    say("in between")
    first, between, bar = shown(terminal.getvalue())
    assert first.startswith("step 1/4   25%  loss 2.5000"), "no time stamp on a terminal"
    assert between == "in between"
    assert re.fullmatch(r"\[#{5} {15}\]  25%  step 1/4  loss 2.5000  left 0:09, until \d\d:\d\d", bar)
    monkeypatch.setattr(progress_module, "BAR_SECONDS", 0.0)
    for columns, pattern in (
        (60, r"\[##   \]  50%  step 2/4  loss 2.5000  left 0:0\d, until \d\d:\d\d"),
        (46, r"\[##  \]  50%  step 2/4  loss 2.5000  left 0:0\d"),
        (30, r" 50%  step 2/4  loss 2.5000  "),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        progress.show(row(2))
        assert re.fullmatch(pattern, found := shown(terminal.getvalue())[-1]), (columns, found)
    progress.close()
    assert shown(terminal.getvalue()) == [first, between, ""]


def test_progress_shows_the_tables_rate_and_the_share_of_the_peak(capsys):
    progress = ProgressLines(first_step=0, steps=3, every_seconds=5.0)
    progress.show(row(1, 3.0, **{"train/lr_table": 2e-2, "throughput/mfu": 0.4}))
    capsys.readouterr()
    progress.show(row(2, 3.0, **{"train/lr_table": 2e-2, "throughput/mfu": 0.4}))
    progress.show(row(3, 1.0, **{"train/lr_table": 2e-2, "throughput/mfu": 0.8}))
    line = capsys.readouterr().out
    assert "lr 1.0e-03 table 2.0e-02" in line
    assert "MFU 50.0%" in line


@pytest.mark.parametrize(("waits", "told"), [((0.9, 0.6), "waiting for data 50%"), ((0.1, 0.1), "")], ids=str)
def test_progress_shows_when_devices_wait_for_data(capsys, waits, told):
    progress = ProgressLines(first_step=0, steps=3, every_seconds=5.0)
    progress.show(row(1, 1.0))
    capsys.readouterr()
    for step, (seconds, wait) in enumerate(zip((1.0, 2.0), waits, strict=True), 2):
        progress.show(row(step, seconds, **{"throughput/data_wait_seconds": wait}))
    line = capsys.readouterr().out
    assert told in line
    assert ("waiting" in line) == bool(told)


def test_only_devices_with_a_known_peak_have_one(monkeypatch):
    device = jax.devices("cpu")[0]
    assert peak_flops(device) is None
    monkeypatch.setitem(metrics.PEAK_FLOPS, device.device_kind[:2], 1e9)
    assert peak_flops(device) == 1e9


DAMAGE = [
    b"\xff\xfe",
    b"[1, 2]",
    b'{"train/loss": 1.0}',
    b'{"step": "4"}',
    b'{"step": 18446744073709551616}',
    b'{"step": 4, "tr',
    b"",
    b"null",
    b"[" * 5000,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_does_not_affect_others(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], damage, *lines[4:]]))
    assert read_metrics(path).steps.tolist() == [1, 2, 3, 5, 6, 7]
    MetricsFile(path, last_step=6).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 5, 6]


def test_a_duplicate_step_is_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 2, "a": 2}\n')
    found = read_metrics(path)
    assert (found.steps.tolist(), found.last()) == ([1, 2], {"step": 2, "a": 2})
    assert str(found.values("a").tolist()) == "[nan, 2.0]"


def test_only_the_last_row_of_a_step_counts_wherever_it_stands():
    rows = [{"step": 3, "a": 1.5}, {"step": 1, "a": 2}, {"step": 3, "b": None}, {"step": 2, "a": 0.5, "b": 4}]
    found = Metrics(rows)
    assert found.steps.tolist() == [1, 2, 3]
    assert str(found.values("a").tolist()) == "[2.0, 0.5, nan]"
    assert str(found.values("b").tolist()) == "[nan, 4.0, nan]"
    assert found.last() == {"step": 3, "b": None}


def test_the_last_row_is_what_was_written():
    row = {"step": 7, "tokens": 1 << 52, "loss": 0.1, "exact": 2.0, "null": None}
    found = Metrics([{"step": 6, "exact": 1, "null": 3}, row]).last()
    assert found == row
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in row.items()}


def test_lines_wait_while_the_disk_is_full_and_follow_in_order(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)
    file.write({"step": 1})
    file.flush()
    real = file._file
    assert real is not None

    class Full:
        """Writes only the first bytes, like a disk that is almost full."""

        def write(self, data):
            return real.write(data[:5])

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(file, "_file", Full())
    for step in (2, 3):
        file.write({"step": step})
        file.flush()
    printed = capsys.readouterr().err
    assert printed.count("cannot be written") == 1
    assert "No space left" in printed
    assert read_metrics(path).steps.tolist() == [1]
    # Nor can the partial write be undone.
    monkeypatch.setattr(Full, "truncate", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")), raising=False)
    file.write({"step": 4})
    file.flush()
    file._file = real
    file.write({"step": 5})
    file.close()
    assert read_metrics(path).steps.tolist() == [1, 2, 3, 4, 5]
    assert "can be written again; no step is missing" in capsys.readouterr().err


def test_a_file_that_is_removed_while_it_is_written_starts_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file = MetricsFile(path, last_step=0)
    file.write({"step": 1})
    file.flush()
    path.unlink()
    path.parent.rmdir()
    file.write({"step": 2})
    file.close()
    assert path.read_text() == '{"step": 2}\n'


def test_a_row_can_be_amended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    file = MetricsFile(path, last_step=2)
    file.amend(2, {"eval/validation/loss": 0.5})
    file.write({"step": 3})
    file.close()
    assert str(read_metrics(path).values("eval/validation/loss").tolist()) == "[nan, 0.5, nan]"


def usage(step, window=None):
    return {"step": step, "memory/L1/used_fraction": 0.5} | ({} if window is None else {WINDOW: window})


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        ([usage(100), usage(101)], [100]),  # as versions before 0.2 wrote the last row
        ([usage(100, 100), {"step": 101}, usage(200, 100)], [100, 200]),
        ([usage(20, 20)], [20]),
        ([usage(20, 20), usage(100, 100)], [100]),  # a short run that was extended
        ([{"step": 1}], []),
        ([], []),
    ],
)
def test_slot_statistics_over_fewer_steps_are_not_compared(rows, steps):
    found = Metrics(rows)
    assert found.steps.tolist() == [row["step"] for row in rows]
    known = ~np.isnan(found.values("memory/L1/used_fraction"))
    assert found.steps[known].tolist() == steps
    assert found.last_usage() == next((row for row in reversed(rows) if row["step"] in steps), {})


def test_an_invalid_value_does_not_affect_others(tmp_path):
    odd = {"step": 1, "loss": 2.5, "a": [1], "b": "\x00", "c": {"d": 1}, "e": 10**4000, "f": True, "g": None, "h": -3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(odd) + "\n")
    assert read_metrics(tmp_path / "metrics.jsonl").last() == {"step": 1, "loss": 2.5, "f": True, "g": None, "h": -3}
