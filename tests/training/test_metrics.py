"""The metrics file, the progress line and the clock."""

import json

import jax
import pytest

from memjax.training import metrics
from memjax.training.metrics import MetricsFile, Progress, Stopwatch, clock, peak_flops, read_metrics


def write(path, steps, **last):
    with_file = MetricsFile(path, last_step=0)
    for step in steps:
        with_file.write({"step": step, "train/loss": 1 / step, **last})
    with_file.close()


def test_lines_after_the_restored_step_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    file = MetricsFile(path, last_step=5)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    file.write({"step": 6, "train/loss": 0.5})
    file.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_that_was_cut_off_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    file = MetricsFile(path, last_step=3)
    file.write({"step": 3, "train/loss": 0.25})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_numbers_that_json_lacks_become_null(tmp_path):
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
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (36_061.0, "10:01:01")]
)
def test_a_clock_counts_minutes_and_hours(seconds, text):
    assert clock(seconds) == text


def test_a_stopwatch_leaves_out_what_happens_while_it_is_paused(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
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


def test_progress_is_printed_now_and_then_and_at_the_end(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    progress = Progress(first_step=10, steps=15, every_seconds=50.0)
    # Between the steps there is time that is not theirs: compilation, validation.
    for step, seconds, now in ((11, 2.0, 149.0), (12, 6.0, 160.0), (13, 1.0, 170.0), (15, 0.5, 171.0)):  # noqa: B007
        progress.show(row(step, seconds))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["12/15", "15/15"]
    # 2000 tokens in 8 s; 3 steps are left at 4 s each, whatever went by between them and before a resumption.
    assert lines[0] == "step 12/15   80%  loss 2.5000  lr 1.0e-03  250 tokens/s  elapsed 1:00  left 0:12"
    assert lines[1].endswith("1,333 tokens/s  elapsed 1:11  left 0:00")


def test_progress_tells_the_tables_rate_and_the_share_of_the_peak(capsys):
    progress = Progress(first_step=0, steps=2, every_seconds=5.0)
    progress.show(row(1, 3.0, **{"train/lr_table": 2e-2, "throughput/mfu": 0.4}))
    progress.show(row(2, 1.0, **{"train/lr_table": 2e-2, "throughput/mfu": 0.8}))
    line = capsys.readouterr().out
    assert "lr 1.0e-03 table 2.0e-02" in line
    assert "MFU 50.0%" in line


def test_only_devices_with_a_known_peak_have_one(monkeypatch):
    device = jax.devices("cpu")[0]
    assert peak_flops(device) is None
    monkeypatch.setitem(metrics.PEAK_FLOPS, device.device_kind[:2], 1e9)
    assert peak_flops(device) == 1e9
