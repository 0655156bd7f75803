"""`python -m memjax.sweep [CONFIG.yaml] --grid SETTING=VALUE,VALUE ...`: a run for each combination of settings."""

import pathlib
import sys
from collections.abc import Sequence

from memjax.config import arguments
from memjax.config.checks import is_count
from memjax.config.load import Parsed, parse
from memjax.config.problems import Problems
from memjax.config.run import RunConfig
from memjax.errors import ConfigError, DataError
from memjax.io.command import exit_code
from memjax.io.console import format_table, say, warn

PROG = "python -m memjax.sweep"

_OPTIONS = {
    "grid": "SETTING=VALUE,VALUE,...: the values of a setting; given once for each setting that varies.",
    "jobs": "How many runs train at a time (default 1). They share the GPUs of CUDA_VISIBLE_DEVICES.",
}
"""Options that are taken from the command line before the settings are parsed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all combinations; returns 0 if all are done, 2 for wrong settings, 75 after a signal, or a run's code."""
    return exit_code(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    from memjax.training import sweep

    specifications, rest = arguments.take(argv, "grid")
    asked, rest = arguments.take(rest, "jobs")
    parsed: Parsed[RunConfig] = parse(
        RunConfig,
        rest,
        prog=PROG,
        description=(
            "Trains a run for each combination of settings, in folders below run.dir, and compares them. The same "
            "command resumes interrupted runs and skips finished ones."
        ),
        flags=_OPTIONS,
        examples=[
            f"{PROG} wiki_text --data.path a.jsonl --grid optim.lr=1e-3,3e-3 --grid model.memory.num_keys=64,128"
        ],
    )
    grid = sweep.points(sweep.parse_grid(specifications))
    jobs = _jobs(asked)
    file = _config_file(parsed.positional)
    settings = arguments.split(rest, {}, Problems(RunConfig)).settings
    folder = pathlib.Path(parsed.config.run.dir)
    if (folder / "config.yaml").exists():
        raise ConfigError(f"run.dir={folder} is the folder of a run; name another --run.dir for the sweep")
    words = [f"--{'.'.join(path)}={text}" for path, text in settings]
    waiting = sweep.unfinished(file, words, folder, grid)
    if waiting != grid:
        say(f"{len(grid) - len(waiting)} of {len(grid)} runs are already finished")
    code = sweep.Sweep(
        [sys.executable, "-m", "memjax.train", *rest], folder, waiting, jobs=jobs, mirror=parsed.config.run.mirror
    ).run()
    _compare(folder, [folder / point.name for point in grid])
    return code


def _config_file(positional: str | None) -> pathlib.Path | None:
    path = None if positional is None else pathlib.Path(positional)
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is the folder of a run; a sweep starts from a YAML file or a preset")
    return path


def _jobs(asked: Sequence[str]) -> int:
    text = asked[-1] if asked else "1"
    if not (is_count(text) and int(text) > 0):
        raise ConfigError(f"jobs={text} must be a whole number of runs at a time, at least 1")
    return int(text)


def _compare(folder: pathlib.Path, runs: Sequence[pathlib.Path]) -> None:
    """Prints a comparison of the runs; an error here does not change the sweep's exit code."""
    from memjax.monitoring import comparison
    from memjax.monitoring.compared_runs import read_runs, summary_table
    from memjax.monitoring.metrics import has_metrics

    try:
        if not (begun := [run for run in runs if has_metrics(run / "metrics.jsonl")]):
            return
        found = read_runs(begun)
        out = folder / "comparison.png"
        comparison.draw(found, out)
        say("\n" + format_table(summary_table(found)))
        say(f"written to {out}")
    except (DataError, OSError) as error:
        warn(f"the runs are not compared: {error}")


if __name__ == "__main__":
    sys.exit(main())
