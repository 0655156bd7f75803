"""`python -m memjax.plot RUN [RUN ...]`: compares runs in one picture."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import cast

from memjax.config.load import RUN_FOLDER, parse
from memjax.config.section import LocalPath, Positive, Section
from memjax.io.command import exit_code
from memjax.io.console import format_table
from memjax.io.ctrl_c import run_command


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlotConfig(Section):
    """The plot to draw."""

    out: LocalPath[str] = "comparison.png"
    """The file to write: .png, .svg or .pdf, or .html for a self-contained page with the picture and a table."""
    x: str = "step"
    """The horizontal axis: step, tokens, or seconds of training (without compilation and validation). Or a setting such
    as model.memory.num_keys, or parameters or flops_per_token: then one point per run, the last value of `metric`."""
    metric: str | None = None
    """With a setting on the horizontal axis: the metric to plot, such as eval/validation/loss or
    facts/asked/accuracy."""
    interactive: bool = False
    """Make the .html page show values under the pointer, zoom, and toggle runs; needs plotly (pip install plotly)."""
    smoothing: Positive[int] | None = None
    """Steps to average over; 1: no smoothing, null: a fiftieth of the longest run."""

    def problems(self) -> Iterator[str]:
        if pathlib.PurePath(self.out).suffix not in _SUFFIXES:
            yield f"out={self.out} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        if self.metric is not None and self.x in AXES:
            yield f"metric={self.metric} is drawn over a setting; set x to one, or leave metric out"
        if self.x not in AXES and self.metric is None:
            yield (
                f"x={self.x} is neither step, tokens nor seconds; to plot over a setting, set metric "
                "too, such as --metric eval/validation/loss"
            )
        if self.interactive and (pathlib.PurePath(self.out).suffix != ".html" or self.metric is not None):
            yield "interactive=true is for the curves of runs in an .html file, as in --out comparison.html"


_SUFFIXES = (".png", ".svg", ".pdf", ".html")
AXES = ("step", "tokens", "seconds")
RUNS = dataclasses.replace(RUN_FOLDER, help="The folders of the runs.", repeats=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit code: 0 done, 2 wrong settings, 3 no metrics, 4 it cannot be written."""
    parsed = parse(
        PlotConfig,
        argv,
        prog="python -m memjax.plot",
        description="Compares runs: loss, throughput and use of the memory's slots, in one picture.",
        positional=RUNS,
    )
    return exit_code(lambda: _plot([pathlib.Path(run) for run in parsed.positionals], parsed.config))


def _plot(folders: Sequence[pathlib.Path], settings: PlotConfig) -> None:
    # Imported late, so that wrong settings are reported without waiting for NumPy; JAX is not needed at all.
    from memjax.monitoring import comparison, interactive
    from memjax.monitoring.compared_runs import Axis, read_runs, summary_table

    runs = read_runs(folders)
    out = pathlib.Path(settings.out)
    if settings.metric is not None:
        comparison.draw_over(runs, out, metric=settings.metric, x=settings.x)
    else:
        write = interactive.write if settings.interactive else comparison.draw
        write(runs, out, axis=cast("Axis", settings.x), window=settings.smoothing)
    print(format_table(summary_table(runs)))
    for note in comparison.missing(runs) if settings.metric is None else ():
        print(f"there is {note}")
    print(f"written to {settings.out}")


if __name__ == "__main__":
    run_command(main)
