"""Attacks runs and the files that memjax reads, and counts what is lost, silently wrong, hung or ends in a traceback.

    python experiments/trust/run.py --small                       # one case each, two minutes
    python experiments/trust/run.py --jobs 12 --seconds 600       # as many as fit into ten minutes
    python experiments/trust/run.py --only kills,flips --jobs 4   # only some campaigns
    python experiments/trust/run.py --tests                       # the tests of guarantees that no campaign attacks
    python experiments/trust/run.py --report results/*.json       # the tables of stored results

Everything happens in a temporary folder, on the devices in JAX_PLATFORMS (a CPU by default). As root, full and
read-only disks are also tried. Campaigns take turns, so any amount of time covers all of them. The exit code is 1 if
anything failed.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib import metadata

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import harm  # noqa: E402
import knowledge  # noqa: E402
import life  # noqa: E402
from families import FAMILIES  # noqa: E402
from lab import Case, Lab, Skipped  # noqa: E402
from promises import RESULTS, promises, run_tests  # noqa: E402
from records import RECORDS, UNSEALED  # noqa: E402

from memjax.io.files import write_atomic  # noqa: E402


def _claim(make: Callable[..., object]) -> str:
    """Describes a family of files, and what must happen to damaged ones."""
    what = (make.__doc__ or "").strip().removesuffix(".")
    name = make.__name__
    outcome = "refused with a message" if name not in RECORDS else "the file is named"
    outcome = f"{'every record' if name in RECORDS and name not in UNSEALED else 'read'}, or {outcome}"
    return f"{what}; {outcome}"


CAMPAIGNS = {
    "kills": ("R1 R4 R11", "kill -9 at any time; the same command then ends bitwise equal to the undisturbed run"),
    "signals": ("R8 R9", "six signals and floods of them in nine phases; saved or ended in seconds, then as above"),
    "two": ("R1", "the same command twice at once; one trains, the other refuses, nothing is lost"),
    "patches": ("R1 R4", "kill -9 of learn, patch apply and patch revert; the model is the one before or after"),
    "flips": ("R2 R3", "flipped bits, changed lengths and exchanged files of a checkpoint; detected, or equal arrays"),
    "disk": ("R10", "a full, read-only or limited disk at every write; a one-line error, then the run resumes"),
    "sandbox": (
        "-",
        "programs that forge, fill, hang, linger or kill, also without namespaces; none passes or remains",
    ),
    "http": ("-", "odd bodies, heads and chunks, stalled and broken connections; a correct answer, or a clear error"),
    **{name: ("R16" if name in RECORDS else "R22 R29", _claim(make)) for name, make in FAMILIES.items()},
}
FULL = {
    "kills": 52,
    "signals": 3,
    "two": 10,
    "patches": 10,
    "flips": 800,
    "disk": 24,
    "sandbox": 1000,
    "http": 540,
    **dict.fromkeys(FAMILIES, 540),
}
SMALL = {
    "kills": 1,
    "signals": 1,
    "two": 1,
    "patches": 1,
    "flips": 10,
    "disk": 1,
    "sandbox": 30,
    "http": 40,
    **dict.fromkeys(FAMILIES, 12),
}
NO_RUN = {"sandbox", "http", *FAMILIES}
"""Campaigns that do not need a trained run."""
COUNTS = ("tried", "lost", "wrong", "hung", "tracebacks", "other")


def cases_of(lab: Lab, campaign: str, *, small: bool) -> list[Case]:
    """The cases of a campaign, in order."""
    count = (SMALL if small else FULL)[campaign]
    match campaign:
        case "kills":
            return life.kills(lab, count)
        case "signals":
            return life.signals(lab, count)[:1] if small else life.signals(lab, count)
        case "two":
            return life.two(lab, count)
        case "patches":
            return knowledge.patches(lab, count)
        case "disk":
            return life.disk(lab, count)[:1] if small else life.disk(lab, count)
    return harm.cases(lab, campaign, count)


def run(lab: Lab, case: Case) -> Case:
    """Runs a case; its own errors count as faults."""
    started = time.monotonic()
    try:
        case.attempt(case)
    except Skipped as error:
        case.skipped, case.tried = str(error), 0
    except Exception as error:
        case.note("other", f"the attempt itself: {type(error).__name__}: {error}")
    case.seconds = time.monotonic() - started
    return case


def all_cases(lab: Lab, campaigns: list[str], jobs: int, seconds: float, *, small: bool) -> list[Case]:
    """Runs cases of all campaigns in turn until time is up."""
    queues = [cases_of(lab, name, small=small) for name in campaigns]
    waiting = iter([case for turn in itertools.zip_longest(*queues) for case in turn if case is not None])
    done: list[Case] = []
    deadline, told = time.monotonic() + seconds, time.monotonic()
    total = sum(map(len, queues))
    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future[Case]] = set()
        try:
            while True:
                while len(running) < jobs and time.monotonic() < deadline and (case := next(waiting, None)):
                    running.add(pool.submit(run, lab, case))
                if not running:
                    return done
                finished, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for case in (future.result() for future in finished):
                    done.append(case)
                    for note in case.notes:
                        print(f"{case.campaign} {case.name}: {note}\n", flush=True)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    faults = sum(case.faults for case in done)
                    print(f"{len(done)} of {total} cases, {faults} faults, {len(running)} running", flush=True)
        except KeyboardInterrupt:
            print("interrupted: what was tried until now", flush=True)
            lab.stop()
            return done


def table(done: list[Case], campaigns: list[str]) -> str:
    """The counts by campaign, as a Markdown table."""
    lines = [
        "| | Attack and required outcome | tried | lost | silently wrong | hung | tracebacks | other |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in campaigns:
        numbers, claim = CAMPAIGNS[name]
        mine = [case for case in done if case.campaign == name]
        sums = [str(sum(getattr(case, count) for case in mine)) for count in COUNTS]
        lines.append(f"| {name} ({numbers}) | {claim} | {' | '.join(sums)} |")
    return "\n".join(lines)


def report(done: list[Case], campaigns: list[str], tests: dict[str, dict[str, int]]) -> str:
    """Both tables, and the skipped cases."""
    parts = [promises(done, tests), table(done, campaigns)]
    by_reason = sorted((case.skipped, case.name) for case in done if case.skipped)
    for reason, skipped in itertools.groupby(by_reason, lambda pair: pair[0]):
        parts.append(f"Not tried: {', '.join(name for _, name in skipped)} ({reason}).")
    return "\n\n".join(parts)


def read_results(paths: list[pathlib.Path]) -> str:
    """The report of stored results."""
    done, tests = [], {}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        done += [Case(attempt=lambda case: None, **row) for row in result.get("cases", ())]
        tests |= result.get("tests", {})
    return report(done, [name for name in CAMPAIGNS if any(case.campaign == name for case in done)], tests)


def machine() -> dict[str, str | int | None]:
    """Machine, commit and package versions."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "python": platform.python_version(),
        "platforms": os.environ.get("JAX_PLATFORMS", "cpu"),
        "cores": os.cpu_count(),
        **versions,
    }


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CAMPAIGNS), help=f"some of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--small", action="store_true", help="one case each")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case starts later than this")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a process counts as hung")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="cases at once")
    parser.add_argument("--workers", type=int, default=0, help="data workers of every run")
    parser.add_argument("--out", type=pathlib.Path, help="folder for trust.json; default: not written")
    parser.add_argument("--tests", action="store_true", help="run the tests of guarantees, and write tests.json")
    parser.add_argument(
        "--report", type=pathlib.Path, nargs="+", metavar="JSON", help="only print the report of stored results"
    )
    options = parser.parse_args()
    if options.report:
        print(read_results(options.report))
        return 0
    if options.tests:
        found = run_tests(options.jobs)
        kept = json.dumps({"machine": machine(), "tests": found}, indent=1)
        write_atomic((options.out or RESULTS) / "tests.json", f"{kept}\n")
        return int(any(counts["failed"] for counts in found.values()))
    campaigns = options.only.split(",")
    if unknown := [name for name in campaigns if name not in CAMPAIGNS]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    campaigns = [name for name in CAMPAIGNS if name in campaigns]
    # Ends like Ctrl-C: everything running is killed, unmounted and removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="memjax-trust-"))
    lab = Lab(folder, options.patience, options.workers)
    started = time.monotonic()
    try:
        if set(campaigns) - NO_RUN:
            lab.prepare()
            equal = "" if lab.repeats else "not "
            print(f"an undisturbed run takes {lab.seconds:.1f} s; two of them are {equal}equal", flush=True)
        done = all_cases(lab, campaigns, options.jobs, options.seconds, small=options.small)
    finally:
        lab.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{report(done, campaigns, {})}\n\n{time.monotonic() - started:.0f} s with {options.jobs} jobs")
    if threads := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        print(f"threads left: {threads}")
    if options.out:
        keep = ("campaign", "name", "seed", *COUNTS, "skipped", "notes", "seconds")
        rows = [{name: getattr(case, name) for name in keep} for case in done]
        lines = ",\n".join(map(json.dumps, rows))
        how = {name: getattr(options, name) for name in ("only", "small", "seconds", "patience", "jobs", "workers")}
        head = json.dumps({"machine": machine(), "options": how, "equal": lab.repeats}, indent=1)
        write_atomic(options.out / "trust.json", f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n')
        write_atomic(options.out / "trust.md", report(done, campaigns, {}) + "\n")
    return int(any(case.faults for case in done))


if __name__ == "__main__":
    sys.exit(main())
