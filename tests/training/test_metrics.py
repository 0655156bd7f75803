"""The metrics file, the progress line and the clock."""

import json

import jax
import pytest

from memjax.training import metrics
from memjax.training.metrics import MetricsFile, Progress, clock, peak_flops, read_metrics


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


def test_the_newest_value_is_asked_for_by_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2], loss=0.5)
    file = MetricsFile(path, last_step=2)
    assert file.newest(2, "loss") == 0.5
    assert file.newest(1, "loss") is None
    assert file.newest(2, "absent") is None
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (36_061.0, "10:01:01")]
)
def test_a_clock_counts_minutes_and_hours(seconds, text):
    assert clock(seconds) == text


def row(step, **more):
    return {"step": step, "train/loss": 2.5, "train/lr": 1e-3, "throughput/tokens_per_second": 12_345.6} | more


def test_progress_is_printed_now_and_then_and_at_the_end(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    progress = Progress(first_step=10, steps=30, every_seconds=5.0)
    for step, now in ((11, 101.0), (15, 105.0), (16, 109.0), (20, 110.0), (30, 111.0)):  # noqa: B007
        progress.show(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["15/30", "20/30", "30/30"]
    assert lines[0] == "step 15/30   50%  loss 2.5000  lr 1.0e-03  12,346 tokens/s  elapsed 0:05  left 0:15"
    # What was done before a resumption does not make the rest look faster.
    assert lines[1].endswith("elapsed 0:10  left 0:10")
    assert lines[2].endswith("elapsed 0:11  left 0:00")


def test_progress_tells_the_tables_rate_and_the_share_of_the_peak(capsys):
    Progress(first_step=0, steps=1, every_seconds=5.0).show(
        row(1, **{"train/lr_table": 2e-2, "throughput/mfu": 0.4321})
    )
    line = capsys.readouterr().out
    assert "lr 1.0e-03 table 2.0e-02" in line
    assert "MFU 43.2%" in line


def test_only_devices_with_a_known_peak_have_one(monkeypatch):
    device = jax.devices("cpu")[0]
    assert peak_flops(device) is None
    monkeypatch.setitem(metrics.PEAK_FLOPS, device.device_kind[:2], 1e9)
    assert peak_flops(device) == 1e9
