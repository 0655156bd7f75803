"""Compares families: differences with their uncertainty, equivalent dense models, and speed of learning."""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from factlab.report import markdown
from factlab.runs import Result

from realtext.grading import IN_TEXT
from realtext.measures import COMPARISONS, DENSE, MEASURES, SQUAD, Families, Value, seed_deviation

DRAWS = 2000
"""Random draws for an interval."""


def compared(families: Families) -> list[str]:
    """Compares Memory+ with every other family of its size."""
    found = []
    for base in ("memory_plus", "134m_memory_plus"):
        others = [name for name in families if name != base and name.startswith("134m") == base.startswith("134m")]
        if base == "memory_plus" and "134m_dense" in families:
            others.append("134m_dense")
        if base not in families or not others:
            continue
        lines = [
            (f"`{name}`", *(_difference(families, base, name, MEASURES[measure]) for measure in COMPARISONS))
            for name in others
        ]
        found += [
            f"`{base}` minus the other, with twice the standard error from the spread over seeds (below zero: `{base}` "
            "is better):",
            markdown(("against", *COMPARISONS), lines),
        ]
    return found


def _difference(families: Families, one: str, other: str, value: Value) -> str:
    values = [[value(row) for row in families[name]] for name in (one, other)]
    difference = fmean(values[0]) - fmean(values[1])
    deviation = seed_deviation(families, value)
    if deviation is None:
        return f"{difference:+.3f}"
    doubt = 2 * deviation * (1 / len(values[0]) + 1 / len(values[1])) ** 0.5
    verdict = "equal" if abs(difference) <= doubt else "better" if difference < 0 else "worse"
    return f"{difference:+.3f} ± {doubt:.3f}, {verdict}"


def equivalents(families: Families) -> list[str]:
    """The dense model equivalent to each other family, from a line through the dense ones over their log size."""
    dense = [name for name in DENSE if name in families]
    others = [name for name in families if name not in DENSE]
    if len(dense) < 2 or not others:
        return []
    lines = []
    for name in others:
        cells = [f"`{name}`"]
        for measure in ("bits per byte, held out", f"nats, {IN_TEXT}", f"nats, {SQUAD[0]}"):
            sizes = (_flops, _dense_parameters)
            cells += [equivalent(families, dense, name, MEASURES[measure], size) for size in sizes]
        lines.append(cells)
    head = ("family", "FLOPs, held out", "parameters, held out")
    head += ("FLOPs, answers in the text", "parameters, answers in the text", "FLOPs, SQuAD", "parameters, SQuAD")
    shown = ", ".join(f"`{name}`" for name in dense)
    return [
        "The dense model of equal loss, as a multiple of the family's own FLOPs per token and dense parameters: a line "
        f"through {shown} over the logarithm of their size, read off at the family's loss; 90 % intervals from the "
        "spread over seeds. In brackets if it lies outside the range of the dense models.",
        markdown(head, lines),
    ]


def _flops(row: Result) -> float:
    return row["flops_per_token"]


def _dense_parameters(row: Result) -> float:
    return row["parameters"]["dense"]


def equivalent(families: Families, dense: Sequence[str], name: str, value: Value, size: Value) -> str:
    """The size of the dense model with the family's value, relative to the family's size, with its interval."""
    sizes = np.log2([size(families[one][0]) for one in dense])
    means = lambda names: np.array([fmean(value(row) for row in families[one]) for one in names])
    points, own = means(dense), means([name])[0]
    at = lambda points, own: _crossing(sizes, points, own) - np.log2(size(families[name][0]))
    middle = at(points, own)
    outside = not sizes.min() <= middle + np.log2(size(families[name][0])) <= sizes.max()
    shown = _multiple(middle)
    if deviation := seed_deviation(families, value):
        rng = np.random.default_rng(0)
        errors = lambda names: deviation / np.sqrt([len(families[one]) for one in names])
        drawn = [
            at(points + rng.normal(size=len(dense)) * errors(dense), own + rng.normal() * errors([name])[0])
            for _ in range(DRAWS)
        ]
        low, high = np.quantile(drawn, (0.05, 0.95))
        shown += f" ({_multiple(low)} to {_multiple(high)})"
    return f"[{shown}]" if outside else shown


def _crossing(sizes: np.ndarray, points: np.ndarray, own: float) -> float:
    """Where the line fitted to the points has the value `own`."""
    slope, intercept = np.polyfit(sizes, points, 1)
    # A line that does not fall has no such place; return one beyond any model.
    return float((own - intercept) / slope) if slope < 0 else sizes.max() + 100


def _multiple(doublings: float) -> str:
    """Formats a factor of 2 ** doublings; beyond 100 or below 0.01 it is not meaningful."""
    return "no bound" if abs(doublings) > np.log2(100) else f"{2**doublings:.2f}"


def speed_of_learning(families: Families) -> list[str]:
    """Share of its tokens after which each family reaches the final values of dense_x1."""
    if "dense_x1" not in families:
        return []
    measures = {
        "bits per byte, held out": lambda point: point["bits_per_byte"]["held_out"],
        f"nats, {IN_TEXT}": lambda point: point["answers"][IN_TEXT],
        f"nats, {SQUAD[0]}": lambda point: point["answers"][SQUAD[0]],
    }
    lines = []
    for name, runs in families.items():
        cells = [f"`{name}`"]
        for value in measures.values():
            wanted = fmean(value(row["curve"][-1]) for row in families["dense_x1"])
            reached = _reached(runs, value, wanted)
            cells.append("not reached" if reached is None else f"{reached / runs[0]['tokens']:.0%}")
        lines.append(cells)
    return [
        "Share of its tokens after which a family reaches the final value of `dense_x1` (means over seeds; points of "
        "the curve joined by lines):",
        markdown(("family", *measures), lines),
    ]


def _reached(runs: Sequence[Result], value: Callable[[Result], float], wanted: float) -> float | None:
    """Tokens after which the mean over runs first is at most `wanted`; None if it stays above."""
    before: tuple[float, float] | None = None
    for points in zip(*(row["curve"] for row in runs), strict=True):
        now = (points[0]["tokens"], fmean(map(value, points)))
        if now[1] <= wanted:
            if before is None:
                return now[0]
            return before[0] + (now[0] - before[0]) * (before[1] - wanted) / (before[1] - now[1])
        before = now
    return None
