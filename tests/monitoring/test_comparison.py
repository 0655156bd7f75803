"""Comparisons of runs: what they read, smooth, note and draw."""

import io
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from limits import files_of_at_most
from memjax.errors import DataError
from memjax.io.console import format_table
from memjax.monitoring.compared_runs import Run, read_runs, smoothed, smoothing_window, summary_table
from memjax.monitoring.comparison import draw, missing
from memjax.monitoring.metrics import Metrics


def row(step: int, *, memory: bool = True) -> dict:
    found = {"step": step, "train/loss": 4 / step, "train/tokens": 100, "throughput/step_seconds": 0.5}
    found["throughput/tokens_per_second"] = 200.0
    if step % 4 == 0:
        found["eval/validation/loss"] = 5 / step
        if memory:
            shares = {"used": 0.8, "effective": 0.4}
            found |= {f"memory/L{n}/{name}_fraction": value - n / 10 for n in (1, 2) for name, value in shares.items()}
    return found


def run(name: str, steps: int, *, memory: bool = True) -> Run:
    return Run(name, Metrics(row(step, memory=memory) for step in range(1, steps + 1)))


@given(values=st.lists(st.floats(-10, 10) | st.just(float("nan")), min_size=1, max_size=30), window=st.integers(1, 40))
def test_smoothing_is_the_mean_of_the_neighbours_that_are_numbers(values, window):
    found = smoothed(np.array(values), window)
    for place, mean in enumerate(found):
        near = [v for i, v in enumerate(values) if -(window // 2) <= i - place <= (window - 1) // 2 and v == v]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9) if near else np.isnan(mean)


def test_one_step_is_not_smoothed_and_long_runs_are_more():
    np.testing.assert_array_equal(smoothed(np.array([3.0, np.nan, 1.0]), 1), [3.0, np.nan, 1.0])
    assert smoothing_window([run("a", 20), run("b", 500)]) == 10
    assert smoothing_window([run("a", 20)]) == 1


def test_runs_are_named_by_what_distinguishes_them(tmp_path):
    for folder in ("one/base", "two/base", "two/wide"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
    names = [found.name for found in read_runs([tmp_path / "one/base", tmp_path / "two/base", tmp_path / "two/wide"])]
    assert names == ["one/base", "two/base", "wide"]
    again = [tmp_path / "two/wide", tmp_path / "one/../two/wide"]
    assert [found.name for found in read_runs(again)] == ["wide"], "one folder is one run"


def test_on_a_narrow_terminal_the_table_is_turned_over(monkeypatch):
    table = [["run", "loss", "tokens"], ["a", "1.5", "4,000"], ["long", "-", "9"]]
    wide = ["run   loss  tokens", "a      1.5   4,000", "long     -       9"]
    monkeypatch.setenv("COLUMNS", "18")
    assert format_table(table).splitlines() == wide
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert format_table(table).splitlines() == ["run         a  long", "loss      1.5     -", "tokens  4,000     9"]
    monkeypatch.setenv("COLUMNS", "19")
    assert format_table(table).splitlines() == wide


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there are no metrics in metrics\.jsonl"):
        read_runs([tmp_path / "nowhere"])


def test_missing_values_of_runs_are_noted():
    lacking = Run("short", Metrics([{"step": 1, "train/loss": 1.0}]))
    assert missing([run("a", 8), lacking]) == [
        "no validation loss in short",
        "no throughput in short",
        "no slot use in short",
    ]
    assert missing([run("a", 8, memory=False), run("b", 8, memory=False)]) == ["no slot use in any run"]
    assert missing([run("a", 8)]) == []


def test_places_on_the_axes_are_sums_over_the_steps():
    found = run("a", 3)
    np.testing.assert_array_equal(found.along("step"), [1, 2, 3])
    np.testing.assert_array_equal(found.along("tokens"), [100, 200, 300])
    np.testing.assert_array_equal(found.along("seconds"), [0.5, 1.0, 1.5])


def test_the_table_shows_where_runs_ended():
    bad = Run("bad", Metrics([{"step": 1, "train/loss": None}]))
    assert summary_table([run("good", 8), bad])[1:] == [
        ["good", "8", "800", "0.5000", "0.6250", "200", "65.0%"],
        ["bad", "1", "0", "-", "-", "-", "-"],
    ]


RUNS = {
    "different lengths and odd names": [run("long", 200), run("_$x$ <b>&amp;", 7), run("dense", 60, memory=False)],
    "nothing but nulls": [Run("nulls", Metrics([{"step": 1, "train/loss": None}]))],
    "more runs than colours have names": [run(f"run {number}", 4) for number in range(12)],
    "losses of zero": [Run("zero", Metrics([row(1) | {"train/loss": 0.0}]))],
}


@pytest.mark.parametrize("name", RUNS)
def test_pictures_are_drawn_of_whatever_exists(tmp_path, name):
    draw(RUNS[name], tmp_path / "new" / "out.png")
    assert image.imread(tmp_path / "new" / "out.png").std() > 0.005, "the picture is blank"


@pytest.mark.parametrize("name", ["out.png", "out.html"])
def test_a_disk_that_fills_up_keeps_the_picture_there_was(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    with files_of_at_most(4096), pytest.raises(OSError, match=f"File too large: '.*{name}'"):
        draw(RUNS["losses of zero"], tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"old"}


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    runs = RUNS["different lengths and odd names"]
    draw(runs, tmp_path / "out.html", axis="tokens", window=3)
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "_$x$ &lt;b&gt;&amp;amp;" in page
    assert "<li>no slot use in dense</li>" in page
    for cell in summary_table(runs)[1]:
        assert f"<td>{cell}</td>" in page
    loaded = re.findall(r"""(?:src|href)="([^"#][^"]*)"|url\(([^#)][^)]*)\)|<script|@import""", page)
    assert all(address.startswith("data:image/png;base64,") for pair in loaded for address in pair if address)
    assert "<script" not in page
