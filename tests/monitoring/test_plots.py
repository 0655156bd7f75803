"""Which plots are written, and what they show."""

import pytest
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from memjax.monitoring.compared_runs import Run
from memjax.monitoring.comparison import draw
from memjax.monitoring.metrics import Metrics
from memjax.monitoring.plots import label_ends, plot_run


def rows(memory: bool):
    for step in range(1, 41):
        row = {"step": step, "train/loss": 3 / step}
        if step % 20 == 0:
            row["eval/validation/loss"] = 4 / step
            if memory:
                row |= {f"memory/L1/{field}_fraction": step / 80 for field in ("used", "dead", "effective")}
        yield row


@pytest.mark.parametrize(("memory", "names"), [(True, ["loss.png", "slots.png"]), (False, ["loss.png"])])
def test_a_run_gets_a_plot_of_its_losses_and_of_its_slots(tmp_path, memory, names):
    written = plot_run(Metrics(rows(memory)), tmp_path / "plots")
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    for path in written:
        pixels = image.imread(path)
        assert pixels.std() > 0.01, f"{path.name} is blank"


def test_losses_that_are_zero_or_null_do_not_stop_the_plots(tmp_path):
    written = plot_run(Metrics([{"step": 1, "train/loss": 0.0}, {"step": 2, "train/loss": None}]), tmp_path)
    assert [path.name for path in written] == ["loss.png"]


def test_the_backend_of_the_caller_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.use", lambda *_, **__: pytest.fail("a notebook would show no figures any more"))
    assert len(plot_run(Metrics(rows(True)), tmp_path)) == 2
    draw([Run("a", Metrics(rows(True)))], tmp_path / "a.svg")


def test_a_curve_is_named_at_the_height_of_its_end_and_close_ones_apart():
    axes = Figure().subplots()
    axes.plot([0, 1], [5.0, 50.0])
    label_ends(axes, [((1, 50.0), "top", "k"), ((1, 5.0), "low", "k"), ((1, 5.1), "near", "k")])
    heights = {note.get_text(): note.xy[1] for note in axes.texts if isinstance(note, Annotation)}
    low, high = axes.get_ylim()
    assert heights["low 5"] == pytest.approx((5 - low) / (high - low))
    assert heights["top 50"] == pytest.approx((50 - low) / (high - low))
    assert heights["near 5.1"] == pytest.approx(heights["low 5"] + 0.06)
