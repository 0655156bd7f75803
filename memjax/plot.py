"""`python -m memjax.plot RUN [RUN ...]`: runs compared in one picture."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

from memjax.config.checks import local_paths
from memjax.config.load import RUN_FOLDER, parse
from memjax.runs.command import exit_code


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlotConfig:
    """What to draw."""

    out: str = "comparison.png"
    """The file to write: .png, or .html for one page with the picture and a table that needs no other file."""
    x: Literal["step", "tokens", "seconds"] = "step"
    """The horizontal axis: steps, tokens read, or seconds of training (neither compilation nor validation)."""
    smoothing: int | None = None
    """Steps that are averaged; 1 draws each step alone, null takes a fiftieth of the longest run."""

    def __post_init__(self) -> None:
        problems = [text for text in local_paths(self, "out") if text]
        if pathlib.PurePath(self.out).suffix not in (".png", ".html"):
            problems.append(f"out={self.out} must end in .png or .html")
        if self.smoothing is not None and self.smoothing < 1:
            problems.append(f"smoothing={self.smoothing} must be positive")
        if problems:
            raise ValueError("\n".join(problems))


RUNS = dataclasses.replace(RUN_FOLDER, help="The folders of the runs.", repeats=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit code: 0 done, 2 wrong settings, 3 no metrics, 4 it cannot be written."""
    parsed = parse(
        PlotConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m memjax.plot",
        description="Compares runs: loss, throughput and use of the memory's slots, in one picture.",
        positional=RUNS,
    )
    return exit_code(lambda: _plot([pathlib.Path(run) for run in parsed.positionals], parsed.config))


def _plot(folders: Sequence[pathlib.Path], settings: PlotConfig) -> None:
    # Only now, so that wrong settings need not wait for NumPy; JAX is not needed at all.
    from memjax.monitoring import comparison

    runs = comparison.read_runs(folders)
    comparison.draw(runs, pathlib.Path(settings.out), axis=settings.x, window=settings.smoothing)
    table = comparison.summary_table(runs)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers in table:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))
    for note in comparison.missing(runs):
        print(f"there is {note}")
    print(f"written to {settings.out}")


if __name__ == "__main__":
    sys.exit(main())
