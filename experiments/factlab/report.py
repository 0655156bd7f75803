"""Tables and plots, made only from the results' JSON."""

import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from factlab.runs import Result
from memjax.io.files import write_atomic

BEGIN = "<!-- made from results/full.json by run.py --report -->"
END = "<!-- end of what is made -->"
NOT_RUN = "Not run at full size yet."

Rows = list[Result]
Key = tuple[Any, ...]


def grouped(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, Rows]:
    """Groups results by a key, in order of first appearance."""
    groups: dict[Key, Rows] = {}
    for row in results:
        groups.setdefault(key(row), []).append(row)
    return groups


def spread(rows: Rows, value: Callable[[Result], float], form: str = ".1%") -> str:
    """The mean over runs, with the lowest and the highest if there are several."""
    values = [value(row) for row in rows]
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def bits_per_parameter(row: Result) -> float:
    """Stored bits divided by the number of parameters."""
    return row["stored_bits"] / row["parameters"]["total"]


def millions(count: float) -> str:
    """A count in millions; empty for 0."""
    return f"{count / 1e6:.2f} M" if count else ""


def settings(row: Result) -> str:
    """The settings by which a run differs from its family's config."""
    pairs = zip(*[iter(row["settings"])] * 2, strict=True)
    words = [f"`{name.removeprefix('--')}` {value}" for name, value in pairs]
    return ", ".join(words + (["perfect address"] if row["perfect_address"] else [])) or "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_into(readme: pathlib.Path, text: str, begin: str = BEGIN) -> None:
    """Replaces the text between the marks."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{readme}: needs the lines {begin!r} and {END!r}, between which the results go")
    write_atomic(readme, f"{before}{begin}\n\n{text or NOT_RUN}\n\n{END}{after}")


def draw(
    path: pathlib.Path,
    panels: Sequence[tuple[str, str, dict[str, list[tuple[Any, Any]]]]],
    x_label: str | Sequence[str],
    styles: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Draws panels of (title, y label, points by name), with points (x, values over seeds); error bars are the range.

    `x_label` is one label for all panels, or one per panel. Numeric x gets a logarithmic axis, names a categorical one.
    `styles` holds matplotlib's line options by name.
    """
    x_labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), layout="constrained")
    for axes, (title, y_label, lines), label in zip(all_axes, panels, x_labels, strict=True):
        for name, points in lines.items():
            x = [point[0] for point in points]
            middle = [statistics.mean(point[1]) for point in points]
            below = [mean - min(point[1]) for mean, point in zip(middle, points, strict=True)]
            above = [max(point[1]) - mean for mean, point in zip(middle, points, strict=True)]
            style = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1} | dict(styles.get(name, {}))
            axes.errorbar(x, middle, yerr=[below, above], label=name, **style)
        axes.set(title=title, xlabel=label, ylabel=y_label)
        axes.grid(alpha=0.3)
        if any(isinstance(point[0], str) for points in lines.values() for point in points):
            continue
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    shown = {
        name: handle
        for axes in all_axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        if not name.startswith("_")
    }
    figure.legend(shown.values(), shown.keys(), fontsize="small", loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
