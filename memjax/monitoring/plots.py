"""Plots of a run, written as PNG files."""

import io
import pathlib
from collections.abc import Sequence

from memjax.io.files import write_atomic
from memjax.monitoring.metrics import Row, comparable


def plot_run(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """loss.png, and slots.png where there is memory: the files that were written."""
    # matplotlib takes a second to import and is needed only here; Agg draws without a display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []

    def save(name: str, title: str, axis_label: str, curves: dict[str, str], *, log: bool) -> None:
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for key, label in curves.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="step", ylabel=axis_label)
        # matplotlib warns of a logarithmic axis without a positive value.
        if log and any((row.get(key) or 0) > 0 for row in rows for key in curves):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        pyplot.close(figure)
        written.append(write_atomic(folder / name, image.getvalue()))

    def present(curves: dict[str, str]) -> dict[str, str]:
        return {key: label for key, label in curves.items() if any(row.get(key) is not None for row in rows)}

    losses = present({"train/loss": "training", "eval/validation/loss": "validation"})
    if losses:
        save("loss.png", "Loss", "nats per token", losses, log=True)
    layers = sorted({name.split("/")[1] for row in rows for name in row if name.startswith("memory/")})
    fields = {"used_fraction": "used", "effective_fraction": "effective", "dead_fraction": "dead"}
    rows = comparable(rows)
    slots = {f"memory/{layer}/{field}": f"{layer} {label}" for layer in layers for field, label in fields.items()}
    if slots := present(slots):
        save("slots.png", "Slots of the memory layers", "share of slots", slots, log=False)
    return written
