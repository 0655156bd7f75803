"""Runs that are compared: their metrics, the settings in which they differ, and a table of their results."""

import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.config.schema import show
from memjax.errors import ConfigError, DataError
from memjax.io.files import read_object
from memjax.monitoring.metrics import Metrics, read_metrics

Axis = Literal["step", "tokens", "seconds"]
Values = NDArray[np.float64]

_AXIS_METRICS = {"tokens": "train/tokens", "seconds": "throughput/step_seconds"}
_PARTS = 50
"""Number of parts of the longest run, each as long as the smoothing window."""

_NOT_COMPARED = ("run.dir", "run.compile_cache", "log.", "processes.", "data.prepared")
_MOST_SETTINGS = 6
"""Maximum number of differing settings that a table shows."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Metrics, settings and summary of one run."""

    name: str
    metrics: Metrics
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings, by dotted name."""
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The summary of a finished run; empty before."""

    def values(self, metric: str) -> Values:
        """A metric at every step; NaN where it was not measured, or was not finite."""
        return self.metrics.values(metric)

    def slot_share(self, field: str) -> Values:
        """A share of the slots at every step, averaged over the memory layers; NaN where it was not measured."""
        pattern = re.compile(rf"memory/[^/]+/{field}")
        found = [self.values(metric) for metric in sorted(filter(pattern.fullmatch, self.metrics.names()))]
        return np.mean(found or [np.full(len(self.metrics.steps), np.nan)], axis=0)

    def final(self, metric: str) -> float:
        """Final value of a metric, a setting, or a number of the summary such as facts/asked/accuracy."""
        if metric in self.settings:
            value = self.settings[metric]
        else:
            values = self.values(metric)
            known = values[np.isfinite(values)]
            value: Any = known[-1] if known.size else self.summary
            for name in metric.split("/") if not known.size else ():
                value = value.get(name) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) else math.nan

    def along(self, axis: Axis) -> Values:
        """Each row's coordinate on the horizontal axis."""
        if axis == "step":
            return self.values("step")
        return np.nancumsum(self.values(_AXIS_METRICS[axis]))


def read_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
    """The runs in the given folders, each named by the shortest unique suffix of its path.

    Raises:
        DataError: a folder has no metrics.
    """
    paths = {folder.resolve(): folder for folder in folders}
    runs = []
    for path, folder in paths.items():
        metrics = read_metrics(path / "metrics.jsonl")
        if not len(metrics.steps):
            raise DataError(f"{folder}: there are no metrics in metrics.jsonl; name the folder of a run that has begun")
        lengths = range(1, len(path.parts) + 1)
        ends = (path.parts[-length:] for length in lengths)
        name = next(end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
        runs.append(
            Run("/".join(name), metrics, _settings(path / "config.yaml"), read_object(path / "summary.json") or {})
        )
    return runs


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings of a run; empty if the file is damaged or of another version, since its metrics are still useful."""
    try:
        tree = dataclasses.asdict(load(RunConfig, path))
    except ConfigError:
        return {}
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def varying(runs: Sequence[Run]) -> list[str]:
    """The settings in which the runs differ, except those about a run's location and logging."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: {show(run.settings.get(name)) for run in runs if run.settings} for name in names}
    return [name for name, found in values.items() if len(found) > 1 and not name.startswith(_NOT_COMPARED)]


def smoothed(values: Values, window: int) -> Values:
    """The moving average over `window` neighbouring values, fewer at the ends; NaNs are ignored."""
    known = np.isfinite(values)
    # window - 1 neighbours, equally many on both sides, or one more before.
    before, after = window // 2, (window - 1) // 2
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0), known))
    places = np.arange(len(values))
    first, last = np.maximum(places - before, 0), np.minimum(places + after + 1, len(values))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def smoothing_window(runs: Sequence[Run]) -> int:
    """Steps to average over: a fiftieth of the longest run."""
    return max(1, max(len(run.metrics.steps) for run in runs) // _PARTS)


def summary_table(runs: Sequence[Run]) -> list[list[str]]:
    """A header and a row for every run: what it is, how far it got, and its results.

    Columns that no run has are left out: differing settings, parameters, arithmetic, answers to questions.
    """
    settings = varying(runs)[:_MOST_SETTINGS]
    fixed = ["steps", "tokens", "loss", "best validation", "tokens/s", "slots read"]
    ends = Counter([*(name.rpartition(".")[2] for name in settings), *fixed])
    names = [end if ends[end := name.rpartition(".")[2]] == 1 else name for name in settings]
    numbers = {name: form for name, form in _OF_SUMMARY.items() if any(form(run) != "-" for run in runs)}
    rows = [["run", *names, *numbers, *fixed]]
    for run in runs:
        window = smoothing_window([run])
        loss, validation = smoothed(run.values("train/loss"), window), run.values("eval/validation/loss")
        speed, used = run.values("throughput/tokens_per_second"), run.slot_share("used_fraction")
        rows.append(
            [
                run.name,
                *(show(run.settings[name]) if name in run.settings else "-" for name in settings),
                *(form(run) for form in numbers.values()),
                f"{run.metrics.steps[-1]:,}",
                f"{np.nansum(run.values('train/tokens')):,.0f}",
                _number(loss[-1:], ".4f"),
                _number([np.nanmin(validation)] if np.isfinite(validation).any() else [], ".4f"),
                _number([np.nanmedian(speed)] if np.isfinite(speed).any() else [], ",.0f"),
                _number(used[np.isfinite(used)][-1:], ".1%"),
            ]
        )
    return rows


def _of_summary(path: str, form: str) -> Callable[[Run], str]:
    """Formats a number of the summary, given its path."""
    return lambda run: _number([run.final(path)], form)


_OF_SUMMARY = {
    "parameters": _of_summary("parameters", ",.0f"),
    "FLOPs/token": _of_summary("flops_per_token", ".3g"),
    "facts asked": _of_summary("facts/asked/accuracy", ".1%"),
    "facts told": _of_summary("facts/held_out/accuracy", ".1%"),
}


def _number(last: Any, form: str) -> str:
    return f"{last[0]:{form}}" if len(last) and np.isfinite(last[0]) else "-"
