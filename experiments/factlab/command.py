"""The shared command line of the experiments: stages of runs, a time limit, results that accumulate over calls."""

import argparse
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from factlab.report import write_into
from factlab.runs import Pool, Result, Training, read_results

RunsOf = Callable[[str, dict[str, Result]], Sequence[Training]]
"""The runs of a stage, given the results so far."""
Report = Callable[[list[Result], pathlib.Path], str]
"""Returns the README's tables of results, and writes figures into the folder."""


def parser(description: str | None, *, stages: Sequence[str], sizes: Sequence[str], folder: pathlib.Path):
    """The options of every experiment."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stage", nargs="+", choices=stages, default=stages, help="stages to run, in this order")
    made.add_argument("--size", choices=sizes, default=sizes[0], help="small only shows that everything runs")
    made.add_argument("--families", nargs="+", help="run only these")
    made.add_argument("--jobs", type=int, default=4, help="concurrent trainings, over all GPUs")
    made.add_argument("--gpus", type=int, default=1, help="GPUs to spread them over; each training uses one")
    made.add_argument("--seconds", type=float, help="start no run that would end later than this")
    made.add_argument("--out", type=pathlib.Path, default=folder / "results", help="folder of the results")
    made.add_argument("--plan", action="store_true", help="list the runs and run nothing")
    made.add_argument("--report", action="store_true", help="only write the README's tables and plots from results")
    return made


def serve(
    arguments: argparse.Namespace,
    folder: pathlib.Path,
    runs_of: RunsOf,
    report: Report,
    *,
    deadline: float | None = None,
    awaited: Sequence[str] | None = None,
    **of_pool: Any,
) -> None:
    """Runs the requested stages as far as time allows, or writes the report of the committed results.

    Args:
        arguments: the parsed command line.
        folder: the experiment's folder.
        runs_of: returns the runs of a stage.
        report: returns the README's tables.
        deadline: overrides --seconds, if they began before this call.
        awaited: stages that must end before the next begins, because its runs depend on them; None: all.
        of_pool: options of the Pool.
    """
    if arguments.report:
        rows = list(read_results(folder / "results" / "full.json").values())
        write_into(folder / "README.md", report(rows, folder))
        return
    if deadline is None and arguments.seconds is not None:
        deadline = time.time() + arguments.seconds
    path = arguments.out / f"{arguments.size}.json"
    # Committed results are not run again, wherever new ones are written.
    results = read_results(path, folder / "results" / path.name)
    pool = Pool(path, results, jobs=arguments.jobs, gpus=arguments.gpus, deadline=deadline, **of_pool)
    still_open: list[str] = []
    for stages in _together(arguments.stage, awaited):
        runs = [run for stage in stages for run in runs_of(stage, results)]
        if arguments.families:
            runs = [run for run in runs if getattr(run, "family", None) in arguments.families]
        print(f"--- {', '.join(stages)}", flush=True)
        if arguments.plan:
            print("\n".join(f"{run.name}: {'done' if run.name in results else 'to do'}" for run in runs))
        else:
            still_open += pool.run(runs)
    if not arguments.plan:
        print("\n".join(["without a result:", *still_open]) if still_open else "every run has its result", flush=True)


def _together(stages: Sequence[str], awaited: Sequence[str] | None) -> list[list[str]]:
    """Groups stages so that each group begins only when the previous one has ended."""
    groups: list[list[str]] = []
    for stage in stages:
        if not groups or awaited is None or groups[-1][-1] in awaited:
            groups.append([])
        groups[-1].append(stage)
    return groups
