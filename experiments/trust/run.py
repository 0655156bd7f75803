"""Attacks on runs and on what memjax reads, counted: what was lost, silently wrong, hung or ended in a traceback.

    python experiments/trust/run.py --small                       # one case each, two minutes
    python experiments/trust/run.py --jobs 12 --seconds 600       # as many as fit into ten minutes
    python experiments/trust/run.py --only kills,flips --jobs 4   # some campaigns alone
    python experiments/trust/run.py --report results/*.json       # the tables of what was kept

All of it happens in a temporary folder, on the devices that JAX_PLATFORMS names (a CPU by default). As root, full and
read-only disks are tried too. Cases take turns, so any time gives some of each. The exit code is 1 if anything failed.
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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib import metadata

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import harm  # noqa: E402
import knowledge  # noqa: E402
import life  # noqa: E402
from lab import Case, Lab, Skipped  # noqa: E402

CAMPAIGNS = {
    "kills": ("R1 R4 R11", "kill -9 at any moment; the same command ends bitwise as the undisturbed run"),
    "signals": ("R8 R9", "six signals and floods of them in nine phases; saved or refused in seconds, then as above"),
    "two": ("R1", "the same command twice at once; one trains, the other refuses, nothing is lost"),
    "patches": ("R1 R4", "kill -9 of learn, patch apply and patch revert; the model is the one before or after"),
    "flips": ("R2 R3", "bits, lengths and places of all files of a checkpoint; detected, or equal arrays"),
    "disk": ("R10", "a full, read-only or limited disk at every write; one line, then it goes on"),
    "data": ("R16", "damaged data files of every format; every record, or an error that names the place"),
    "config": ("R22 R29", "damaged settings, tokenizers and documents of a run; one line that says what"),
    "sandbox": ("-", "programs that cheat, fill, hang and stay; none passes, nothing is left behind"),
}
PROMISES = {
    "R1": ("kill -9 at any moment, and a second process, cost at most the steps since the checkpoint", "kills two"),
    "R2": ("flipped bits of a checkpoint are found, or change nothing", "flips"),
    "R3": ("so are files that are cut, removed, or of another step", "flips"),
    "R4": ("whatever stopped it, a run ends bitwise as one that was never stopped", "kills signals two disk"),
    "R5": ("the same on a GPU", "-"),
    "R6": ("a checkpoint is read on another mesh, bit for bit", "tests/checkpoint/test_checkpoints.py"),
    "R7": (
        "bfloat16 tables, as GPUs train them, are read where the machine computes in float32",
        "tests/runs/test_load.py",
    ),
    "R8": ("a signal in any phase saves, or ends a start that has nothing to save", "signals"),
    "R9": ("signals in floods of twenty do not harm the save", "signals"),
    "R10": ("a disk that is full, read-only or limited is a line, and the run goes on when it is mended", "disk"),
    "R11": ("the last step is saved before the report", "kills signals"),
    "R12": ("a NaN, also in one shard's gradient, changes nothing and ends the run", "tests/training/test_step.py"),
    "R13": ("micro-batches give the gradient of the whole batch", "tests/training/test_step_float64.py"),
    "R14": ("every mesh draws the same model and gives the same losses", "tests/training/test_step_float64.py"),
    "R15": ("another number of data workers is refused with both numbers", "tests/data/test_loader.py"),
    "R16": ("damaged data is an error that names the place, or is counted", "data"),
    "R17": ("ids beyond the vocabulary are refused", "tests/data/prepared/test_prepare.py"),
    "R18": ("another tokenizer or other data is refused", "tests/data/test_loader.py"),
    "R19": ("NaN scores give NaN, and indices within the table", "tests/ops/test_product_key_search.py"),
    "R20": ("the product-key search finds the best of all pairs", "tests/ops/test_product_key_search.py"),
    "R21": ("settings survive YAML, the command line and checkpoints", "tests/config/test_run.py"),
    "R22": (
        "hostile files are refused, and nothing in them is executed",
        "config tests/interop/official/test_torch_zip.py",
    ),
    "R23": ("scores do not hang on the batch", "tests/inference/test_scoring.py"),
    "R24": ("log-likelihoods are those of whole forward passes", "tests/evaluation/test_harness.py"),
    "R25": ("an exported model comes back bit for bit", "tests/interop/huggingface/test_convert.py"),
    "R26": ("a shared table is counted, saved and exported once", "tests/interop/huggingface/test_convert.py"),
    "R27": ("the planned memory is 5 % too little to 15 % too much", "tests/training/plan/test_memory.py"),
    "R28": ("a tracker that cannot be reached costs a line", "tests/monitoring/trackers/test_tracker.py"),
    "R29": ("wrong settings end with code 2 and a hint", "config tests/config/test_load_errors.py"),
    "R30": ("runs of earlier versions load and resume", "tests/end_to_end/test_golden_runs.py"),
}
"""What is promised, and the campaigns that attack it or the tests that hold it; `-`: nothing here shows it."""
FULL = {
    "kills": 52,
    "signals": 3,
    "two": 10,
    "patches": 10,
    "flips": 800,
    "disk": 24,
    "data": 900,
    "config": 900,
    "sandbox": 1,
}
SMALL = {
    "kills": 1,
    "signals": 1,
    "two": 1,
    "patches": 1,
    "flips": 10,
    "disk": 1,
    "data": 9,
    "config": 12,
    "sandbox": 1,
}
NO_RUN = {"data", "sandbox"}
"""Campaigns that need no trained run."""
COUNTS = ("tried", "lost", "wrong", "hung", "tracebacks", "other")


def cases_of(lab: Lab, campaign: str, *, small: bool) -> list[Case]:
    """The cases of a campaign, in the order in which they are tried."""
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
    """Tries a case; its own errors count as faults."""
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
    """Tries cases of all campaigns in turn until the time is up."""
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
        "| | What is tried, and what must happen | tried | lost | silently wrong | hung | tracebacks | other |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in campaigns:
        numbers, claim = CAMPAIGNS[name]
        mine = [case for case in done if case.campaign == name]
        sums = [str(sum(getattr(case, count) for case in mine)) for count in COUNTS]
        lines.append(f"| {name} ({numbers}) | {claim} | {' | '.join(sums)} |")
    return "\n".join(lines)


def promises(done: list[Case]) -> str:
    """What is promised, with the figure that the campaigns reached, as a Markdown table."""
    lines = ["| | Promise | Shown by |", "|---|---|---|"]
    for number, (claim, where) in PROMISES.items():
        shown = []
        for word in where.split():
            mine = [case for case in done if case.campaign == word]
            if tried := sum(case.tried for case in mine):
                faults = sum(case.faults for case in mine)
                shown.append(f"{word}: {tried:,} tried, {faults} {'fault' if faults == 1 else 'faults'}")
            elif word == "-":
                shown.append("not tried here")
            else:
                shown.append(f"{word}: not tried" if word in CAMPAIGNS else f"`{word}`")
        lines.append(f"| {number} | {claim} | {'; '.join(shown)} |")
    return "\n".join(lines)


def report(done: list[Case], campaigns: list[str]) -> str:
    """Both tables, and what could not be tried."""
    parts = [table(done, campaigns), promises(done)]
    by_reason = sorted((case.skipped, case.name) for case in done if case.skipped)
    for reason, skipped in itertools.groupby(by_reason, lambda pair: pair[0]):
        parts.append(f"Not tried: {', '.join(name for _, name in skipped)} ({reason}).")
    return "\n\n".join(parts)


def read_cases(path: pathlib.Path) -> list[Case]:
    """The cases of a result that was kept."""
    rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return [Case(attempt=lambda case: None, **row) for row in rows]


def machine() -> dict[str, str | int | None]:
    """Where this was tried."""
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
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case begins later than this")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a process counts as hung")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="cases at once")
    parser.add_argument("--workers", type=int, default=0, help="data workers of every run")
    parser.add_argument("--out", type=pathlib.Path, help="the folder for trust.json; none is written without it")
    parser.add_argument("--report", type=pathlib.Path, nargs="+", metavar="JSON", help="only print what was kept")
    options = parser.parse_args()
    if options.report:
        done = [case for path in options.report for case in read_cases(path)]
        print(report(done, [name for name in CAMPAIGNS if any(case.campaign == name for case in done)]))
        return 0
    campaigns = options.only.split(",")
    if unknown := [name for name in campaigns if name not in CAMPAIGNS]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    # Ends as Ctrl-C does: with everything that runs killed, unmounted and removed.
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
    print(f"\n{report(done, campaigns)}\n\n{time.monotonic() - started:.0f} s with {options.jobs} jobs")
    if threads := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        print(f"threads left: {threads}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        keep = ("campaign", "name", "seed", *COUNTS, "skipped", "notes", "seconds")
        rows = [{name: getattr(case, name) for name in keep} for case in done]
        lines = ",\n".join(map(json.dumps, rows))
        how = {name: getattr(options, name) for name in ("only", "small", "seconds", "patience", "jobs", "workers")}
        head = json.dumps({"machine": machine(), "options": how, "equal": lab.repeats}, indent=1)
        (options.out / "trust.json").write_text(f'{head[:-2]},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")
        (options.out / "trust.md").write_text(report(done, campaigns) + "\n", encoding="utf-8")
    return int(any(case.faults for case in done))


if __name__ == "__main__":
    sys.exit(main())
