"""Several runs in one picture: loss, throughput and slot usage, or any metric over a setting."""

import html
import io
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.errors import DataError
from memjax.io.files import write_atomic
from memjax.monitoring.compared_runs import Axis, Run, Values, smoothed, smoothing_window, summary_table

AXIS_LABELS = {"step": "step", "tokens": "tokens read", "seconds": "seconds of training"}
_GREY = "0.35"


class Sparse(NamedTuple):
    """A metric that is measured only at some steps, or a field of the slot statistics."""

    metric: str
    legend: str
    name: str
    """Name in notes."""
    line: str
    marker: str


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    label: str
    """Label of the vertical axis, with the unit."""
    steady: str | None = None
    """Metric measured at every step, drawn smoothed over the faint raw curve."""
    sparse: tuple[Sparse, ...] = ()
    is_log: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Name of every metric in notes."""
        steady = {self.steady: self.title.lower()} if self.steady else {}
        return steady | {one.metric: one.name for one in self.sparse}


PANELS = (
    Panel(
        "Loss",
        "nats per token",
        "train/loss",
        (Sparse("eval/validation/loss", "validation", "validation loss", "--", "o"),),
        is_log=True,
    ),
    Panel("Throughput", "tokens per second", "throughput/tokens_per_second"),
    Panel(
        "Slot use, mean of the memory layers",
        "share of the slots",
        sparse=(
            Sparse("used_fraction", "read at all", "slot use", "-", "o"),
            Sparse("effective_fraction", "as if read equally often", "slot use", "--", "s"),
        ),
    ),
)


def missing(runs: Sequence[Run]) -> list[str]:
    """Notes on what the picture lacks, because runs did not measure it."""
    notes = {}
    for metric, name in (item for panel in PANELS for item in panel.names.items()):
        if without := [run.name for run in runs if not is_measured(run, metric)]:
            notes[f"no {name} in " + ("any run" if len(without) == len(runs) else ", ".join(without))] = None
    return list(notes)


def draw(runs: Sequence[Run], out: pathlib.Path, *, axis: Axis = "step", window: int | None = None) -> None:
    """Writes the picture to a .png, .svg or .pdf file, or to a self-contained .html file.

    Means are over `window` steps; 1 draws only the values, None chooses a window.
    """
    # matplotlib takes a second to import. pyplot is avoided, because its state belongs to the caller, as in a notebook.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    window = window or smoothing_window(runs)
    panels = [panel for panel in PANELS if any(is_measured(run, metric) for run in runs for metric in panel.names)]
    count = max(1, len(panels))
    figure = Figure(figsize=(5.4 * count, 5), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)
    colors = _colors(len(runs))
    for axes, panel in zip(grid[0], panels, strict=False):
        _draw_panel(axes, panel, runs, colors, axis, window)
    handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
    names = [_plain(run.name) for run in runs]
    figure.legend(handles, names, loc="outside upper center", ncols=min(2 * count, len(runs)), frameon=False)
    if notes := missing(runs):
        text = textwrap.fill(_plain(f"There is {'; '.join(notes)}."), 85 * count)
        figure.supxlabel(text, fontsize=8, color=_GREY)
    _write(figure, out, runs, notes)


def draw_over(runs: Sequence[Run], out: pathlib.Path, *, metric: str, x: str) -> None:
    """Writes a picture of the final value of a metric over a setting or another number, with one point per run.

    `metric` and `x` are names that `Run.final` accepts.

    Raises:
        DataError: fewer than two runs have both.
    """
    from matplotlib.figure import Figure

    found = sorted((run.final(x), run.final(metric), run.name) for run in runs)
    found = [point for point in found if np.isfinite(point[:2]).all()]
    if len(found) < 2:
        raise DataError(f"metric={metric} over x={x}: {len(found)} of {len(runs)} runs have both; two are needed")
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    places, values = [point[0] for point in found], [point[1] for point in found]
    axes.plot(places, values, "o", markersize=6)
    for place, value, name in found:
        axes.annotate(_plain(name), (place, value), xytext=(5, 4), textcoords="offset points", fontsize=8, color=_GREY)
    if min(places) > 0 and max(places) >= 8 * min(places):
        axes.set_xscale("log")
    axes.set(xlabel=_plain(x), ylabel=_plain(metric))
    axes.grid(alpha=0.25)
    _write(figure, out, runs, [])


def _write(figure: Any, out: pathlib.Path, runs: Sequence[Run], notes: Sequence[str]) -> None:
    written = io.BytesIO()
    if out.suffix == ".html":
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        svg = written.getvalue().decode()
        write_atomic(out, page(runs, svg[svg.index("<svg") :], notes))
    else:
        figure.savefig(written, format=out.suffix[1:], dpi=130)
        write_atomic(out, written.getvalue())


def series(run: Run, metric: str) -> Values:
    """A metric, or a field of the slot statistics, at every step."""
    return run.values(metric) if "/" in metric else run.slot_share(metric)


def is_measured(run: Run, metric: str) -> bool:
    """Whether a metric has a value at any step."""
    return bool(np.isfinite(series(run, metric)).any())


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[Run], colors: Sequence[Any], axis: Axis, window: int) -> None:
    for run, color in zip(runs, colors, strict=True):
        places = run.along(axis)
        if panel.steady:
            values = run.values(panel.steady)
            alone = {"alpha": 0.25, "linewidth": 0.8} if window > 1 else {"linewidth": 1.2}
            # Rasterised, because one vector shape per step would make files large.
            axes.plot(places, values, color=color, rasterized=True, **alone)
            if window > 1:
                axes.plot(places, smoothed(values, window), color=color, linewidth=1.8)
        for sparse in panel.sparse:
            values = series(run, sparse.metric)
            known = np.isfinite(values)
            style = {"linestyle": sparse.line, "marker": sparse.marker, "markersize": 3.5, "linewidth": 1.2}
            axes.plot(places[known], values[known], color=color, **style)
    axes.set(title=panel.title, xlabel=AXIS_LABELS[axis], ylabel=panel.label)
    axes.grid(alpha=0.25)
    _set_scales(axes, panel, runs, axis)
    _add_legend(axes, panel, runs, window)


def _set_scales(axes: Any, panel: Panel, runs: Sequence[Run], axis: Axis) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    axes.set_xlim(left=0)
    if axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not panel.is_log:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if panel.steady else PercentFormatter(1))
        return
    values = np.concatenate([series(run, metric) for run in runs for metric in panel.names])
    values = values[values > 0]
    if values.size:  # matplotlib warns about logarithmic axes without positive values
        axes.set_yscale("log")
        narrow = values.max() < 10 * values.min()
        axes.yaxis.set_major_locator(MaxNLocator(7) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def _add_legend(axes: Any, panel: Panel, runs: Sequence[Run], window: int) -> None:
    """Explains the kinds of lines, in grey, because colours stand for runs."""
    from matplotlib.lines import Line2D

    grey = lambda **style: Line2D([], [], color=_GREY, **style)
    legend = []
    if panel.steady:
        legend.append((grey(linewidth=0.8, alpha=0.5 if window > 1 else 1), "each step"))
        if window > 1:
            legend.append((grey(linewidth=1.8), f"mean of {window} steps"))
    legend += [
        (grey(linestyle=sparse.line, marker=sparse.marker, markersize=3.5), sparse.legend)
        for sparse in panel.sparse
        if any(is_measured(run, sparse.metric) for run in runs)
    ]
    if legend:
        axes.legend(*zip(*legend, strict=True), fontsize=8, framealpha=0.85)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](number) for number in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * number / (count - 1)) for number in range(count)]


def _plain(text: str) -> str:
    """Escapes text for matplotlib, so that it is neither read as a formula nor hidden as a private name."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def page(runs: Sequence[Run], picture: str, notes: Sequence[str]) -> str:
    """An HTML page with a picture, the table of the runs, and the notes."""
    header, *rows = summary_table(runs)
    escape = lambda cells, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    body = "\n".join(f"<tr>{escape(row, 'td')}</tr>" for row in rows)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    title = html.escape("Comparison of " + ", ".join(run.name for run in runs))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin-top: 1em; }}
td, th {{ padding: 0.3em 0.9em; border-bottom: 1px solid #ccc; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
</style>
</head>
<body>
{picture}
<table>
<tr>{escape(header, "th")}</tr>
{body}
</table>
{f"<p>There is</p><ul>{listed}</ul>" if notes else ""}
</body>
</html>
"""
