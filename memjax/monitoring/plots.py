"""Plots of a run, written as PNG files."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from memjax.io.files import write_atomic
from memjax.monitoring.metrics import Metrics


def plot_run(metrics: Metrics, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes loss.png and, for models with memory, slots.png; returns the files written."""
    # matplotlib takes a second to import. pyplot is avoided, because its state belongs to the caller, as in a notebook.
    from matplotlib.figure import Figure

    written = []

    def save(name: str, title: str, axis_label: str, curves: dict[str, str], *, log: bool) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel="step", ylabel=axis_label)
        ends = []
        for key, label in curves.items():
            values = metrics.values(key)
            known = np.isfinite(values)
            steps, values = metrics.steps[known], values[known]
            marker = "o" if len(steps) < 30 else None
            (line,) = axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.2)
            ends.append(((steps[-1], values[-1]), label, line.get_color()))
        # matplotlib warns about logarithmic axes without positive values.
        if log and any((metrics.values(key) > 0).any() for key in curves):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        label_ends(axes, ends)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        written.append(write_atomic(folder / name, image.getvalue()))

    def present(curves: dict[str, str]) -> dict[str, str]:
        return {key: label for key, label in curves.items() if np.isfinite(metrics.values(key)).any()}

    losses = present({"train/loss": "training", "eval/validation/loss": "validation"})
    if losses:
        save("loss.png", "Loss", "nats per token", losses, log=True)
    layers = sorted({name.split("/")[1] for name in metrics.names() if name.startswith("memory/")})
    fields = {"used_fraction": "used", "effective_fraction": "effective"}
    slots = {f"memory/{layer}/{field}": f"{layer} {label}" for layer in layers for field, label in fields.items()}
    if slots := present(slots):
        save("slots.png", "Slots of the memory layers", "share of slots", slots, log=False)
    return written


def label_ends(axes: Any, ends: Sequence[tuple[Any, str, Any]]) -> None:
    """Writes each curve's name and last value at its end, moving labels apart if curves end close to each other."""
    axes.autoscale_view()  # otherwise the limits are still those of an empty picture
    places = axes.transAxes.inverted().transform(axes.transData.transform([end for end, _, _ in ends]))
    lowest = -np.inf
    for number in np.argsort(places[:, 1], kind="stable"):
        (_, value), label, color = ends[number]
        lowest = max(places[number, 1], lowest + 0.06)
        axes.annotate(
            f"{label} {value:.3g}",
            (1, lowest),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
