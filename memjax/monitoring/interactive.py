"""The comparison of runs as an interactive page (plotly): values on hover, zoom, and runs that can be hidden."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from memjax.errors import ConfigError
from memjax.io.files import write_atomic
from memjax.monitoring import comparison
from memjax.monitoring.compared_runs import Axis, Run, Values, smoothed, smoothing_window
from memjax.monitoring.comparison import PANELS, Panel

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_DASHES = ("dash", "dot")


def write(runs: Sequence[Run], out: pathlib.Path, *, axis: Axis = "step", window: int | None = None) -> None:
    """Writes the page, which includes plotly's script (5 MB) and loads nothing.

    Means are over `window` steps; None chooses a window.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ConfigError("interactive=true needs the package plotly: pip install plotly") from error

    window = window or smoothing_window(runs)
    panels = [panel for panel in PANELS if any(True for run in runs for _ in _curves(panel, run, window))]
    titles = [f"{panel.title}, {panel.label}" for panel in panels]
    figure = make_subplots(rows=max(1, len(panels)), cols=1, shared_xaxes=True, subplot_titles=titles)
    named = set()
    for row, panel in enumerate(panels, 1):
        for number, run in enumerate(runs):
            places = run.along(axis)
            for name, values, dash in _curves(panel, run, window):
                known = np.isfinite(values)
                figure.add_scatter(
                    x=places[known].tolist(),
                    y=values[known].tolist(),
                    name=run.name,
                    legendgroup=run.name,
                    showlegend=run.name not in named,
                    line={"color": _COLORS[number % len(_COLORS)], "dash": dash, "width": 1.6},
                    hovertemplate=f"%{{y:.4g}} {name} at %{{x:,}}",
                    row=row,
                    col=1,
                )
                named.add(run.name)
        if panel.is_log:
            figure.update_yaxes(type="log", row=row, col=1)
    figure.update_xaxes(title_text=comparison.AXIS_LABELS[axis], row=max(1, len(panels)), col=1)
    figure.update_layout(height=280 * len(panels) + 120, hovermode="x unified", template="plotly_white")
    picture = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    write_atomic(out, comparison.page(runs, picture, comparison.missing(runs)).encode())


def _curves(panel: Panel, run: Run, window: int) -> Iterator[tuple[str, Values, str]]:
    """The curves of a run in a panel: name, values and dash style."""
    if panel.steady is not None and comparison.is_measured(run, panel.steady):
        yield f"mean of {window} steps", smoothed(run.values(panel.steady), window), "solid"
    for sparse, dash in zip(panel.sparse, _DASHES, strict=False):
        if comparison.is_measured(run, sparse.metric):
            yield sparse.legend, comparison.series(run, sparse.metric), dash
