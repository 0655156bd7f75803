"""Several runs in one picture: loss, throughput and use of the slots, or any metric over a setting."""

import html
import io
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.errors import DataError
from memjax.monitoring.compared_runs import Axis, Run, Values, smoothed, smoothing_window, summary_table

AXIS_LABELS = {"step": "step", "tokens": "tokens read", "seconds": "seconds of training"}
_GREY = "0.35"


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    label: str
    """Label of the vertical axis, with the unit."""
    steady: str | None
    """Metric measured at every step, drawn smoothed over the faint raw curve; or None."""
    sparse: tuple[tuple[str, str, str], ...]
    """Metrics measured at some steps, or fields of the slot statistics, with their names in the legend and in
    the notes."""


PANELS = (
    Panel("Loss", "nats per token", "train/loss", (("eval/validation/loss", "validation", "validation loss"),)),
    Panel("Throughput", "tokens per second", "throughput/tokens_per_second", ()),
    Panel(
        "Slot use, mean of the memory layers",
        "share of the slots",
        None,
        (
            ("used_fraction", "read at all", "slot use"),
            ("effective_fraction", "as if read equally often", "slot use"),
        ),
    ),
)


def missing(runs: Sequence[Run]) -> list[str]:
    """Notes on what the picture lacks because runs did not measure it."""
    notes = {}
    for panel in PANELS:
        steady = [(panel.steady, panel.title.lower())] if panel.steady else []
        for metric, name in [*steady, *((metric, name) for metric, _, name in panel.sparse)]:
            without = [run.name for run in runs if not np.isfinite(series(run, metric)).any()]
            if without:
                notes[f"no {name} in " + ("any run" if len(without) == len(runs) else ", ".join(without))] = None
    return list(notes)


def draw(runs: Sequence[Run], out: pathlib.Path, *, axis: Axis = "step", window: int | None = None) -> None:
    """Writes the picture.

    Args:
        runs: what to compare.
        out: a .png, .svg or .pdf file, or a .html file that needs no other.
        axis: what is on the horizontal axis.
        window: steps that the drawn means are taken over; 1 draws the values alone, None chooses.
    """
    # matplotlib takes a second to import; without pyplot, whose state belongs to the caller, as in a notebook.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    window = window or smoothing_window(runs)
    panels = [panel for panel in PANELS if any(np.isfinite(series(run, m)).any() for run in runs for m in _all(panel))]
    count = max(1, len(panels))
    figure = Figure(figsize=(5.4 * count, 5), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)
    colors = _colors(len(runs))
    for axes, panel in zip(grid[0], panels, strict=False):
        _draw_panel(axes, panel, runs, colors, axis, window)
    handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
    names = [_plain(run.name) for run in runs]
    figure.legend(handles, names, loc="outside upper center", ncols=min(2 * count, len(runs)), frameon=False)
    notes = missing(runs)
    if notes:
        text = textwrap.fill(_plain(f"There is {'; '.join(notes)}."), 85 * count)
        figure.supxlabel(text, fontsize=8, color=_GREY)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(figure, out, runs, notes)


def draw_over(runs: Sequence[Run], out: pathlib.Path, *, metric: str, x: str) -> None:
    """Writes a picture of where a metric ended over a setting or another such number, one point a run.

    Args:
        runs: what to compare.
        out: as of `draw`.
        metric: as `Run.final` takes it.
        x: likewise.

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
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        svg = written.getvalue()
        out.write_text(page(runs, svg[svg.index("<svg") :], notes), encoding="utf-8")
    else:
        figure.savefig(out, dpi=130)


def _all(panel: Panel) -> list[str]:
    return ([panel.steady] if panel.steady else []) + [metric for metric, _, _ in panel.sparse]


def series(run: Run, metric: str) -> Values:
    """A metric, or a share of the slots by its field, at every step."""
    return run.values(metric) if "/" in metric else run.slot_share(metric)


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[Run], colors: Sequence[Any], axis: Axis, window: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    styles: Any = (("--", "o"), (":", "s")) if panel.steady else (("-", "o"), ("--", "s"))
    legend = []
    for run, color in zip(runs, colors, strict=True):
        places = run.along(axis)
        if panel.steady:
            values = run.values(panel.steady)
            alone = {"alpha": 0.25, "linewidth": 0.8} if window > 1 else {"linewidth": 1.2}
            # Pixels, because every step as a shape would make large files.
            axes.plot(places, values, color=color, rasterized=True, **alone)
            if window > 1:
                axes.plot(places, smoothed(values, window), color=color, linewidth=1.8)
        for (metric, _, _), (line, marker) in zip(panel.sparse, styles, strict=False):
            values = series(run, metric)
            known = np.isfinite(values)
            axes.plot(places[known], values[known], line, color=color, marker=marker, markersize=3.5, linewidth=1.2)
    if panel.steady:
        legend.append((Line2D([], [], color=_GREY, linewidth=0.8, alpha=0.5 if window > 1 else 1), "each step"))
        if window > 1:
            legend.append((Line2D([], [], color=_GREY, linewidth=1.8), f"mean of {window} steps"))
    for (metric, label, _), (line, marker) in zip(panel.sparse, styles, strict=False):
        if any(np.isfinite(series(run, metric)).any() for run in runs):
            legend.append((Line2D([], [], color=_GREY, linestyle=line, marker=marker, markersize=3.5), label))
    axes.set(title=panel.title, xlabel=AXIS_LABELS[axis], ylabel=panel.label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    if axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.title == "Loss":
        losses = np.concatenate([series(run, metric) for run in runs for metric in _all(panel)])
        losses = losses[losses > 0]
        if losses.size:  # matplotlib warns of a logarithmic axis without a positive value
            axes.set_yscale("log")
            narrow = losses.max() < 10 * losses.min()
            axes.yaxis.set_major_locator(MaxNLocator(7) if narrow else LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if panel.steady else PercentFormatter(1))
    if legend:
        axes.legend(*zip(*legend, strict=True), fontsize=8, framealpha=0.85)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](number) for number in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * number / (count - 1)) for number in range(count)]


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formula, and no name that it hides."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def page(runs: Sequence[Run], picture: str, notes: Sequence[str]) -> str:
    """A page with a picture in HTML, the table of the runs and the notes."""
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
