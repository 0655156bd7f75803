"""Interrupts a run by kills, signals, a second process, and full or read-only disks."""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import time
from collections.abc import Iterator

from lab import EVERY, QUICKLY, STEPS, Case, Lab, Skipped

SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2", "XCPU")
PHASES = {
    "imports": None,
    "reading data": "reading tokenizer and data",
    "compiling": "compiling the training step",
    "first step": "step  1/",
    "training": "step  4/",
    "validation": "step  6/",
    "saving": "step  9/",
    "last step": "step 12/",
    "closing": "finished:",
}
"""Phases of a run, and the beginning of the line (after any timestamp) that marks each."""


def kills(lab: Lab, count: int) -> list[Case]:
    """Kills one run with -9 up to six times at random times, then finishes it with one more start."""

    def attempt(case: Case) -> None:
        run, random = lab.folder / f"kill{case.seed}", case.random
        case.tried = 0
        for _ in range(random.randint(2, 6)):
            process = lab.start(lab.command(run))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.1, 1.0) * lab.seconds)
            process.kill()
            case.tried += 1
            before = lab.end(process)
            if before.code == 0:
                break
            if "Traceback (most recent call last)" in before.output:
                case.note("tracebacks", before.output)
        lab.finish(case, run, f"{case.tried} kills")

    return [Case("kills", f"chain {seed}", attempt, seed) for seed in range(count)]


def signals(lab: Lab, rounds: int) -> list[Case]:
    """Sends a signal in every phase of one run, which each start resumes; the same command then finishes it.

    A round of seven runs covers every signal in every phase.
    """
    names = [*SIGNALS, "INT flood"]

    def attempt(case: Case) -> None:
        run = lab.folder / f"signals{case.seed}"
        case.tried = 0
        for place, phase in enumerate(PHASES):
            case.tried += 1
            interrupt(lab, case, run, names[(case.seed + place) % len(names)], phase)
        lab.finish(case, run, "a signal in every phase")

    return [Case("signals", f"run {seed}", attempt, seed) for seed in range(rounds * len(names))]


def interrupt(lab: Lab, case: Case, run: pathlib.Path, name: str, phase: str) -> None:
    """Sends a signal, or a flood of them, to a run that has reached a phase."""
    what, had = f"SIG{name} in {phase}", lab.steps(run)
    process = lab.start(lab.command(run))
    read = wait_for_line(process, PHASES[phase], lab.patience)
    time.sleep(case.random.uniform(0.3, 0.4) * lab.seconds if PHASES[phase] is None else case.random.uniform(0, 0.05))
    number = getattr(signal, f"SIG{name.removesuffix(' flood')}")
    flood = [number, signal.SIGTERM, number] * 7 if name.endswith("flood") else [number]
    for each in flood:
        process.send_signal(each)
    ended = lab.end(process, QUICKLY + lab.seconds, read)
    # Before handlers are installed, signals have their default effect.
    codes = [0, 75, 130] + ([-int(each) for each in flood] if phase == "imports" else [])
    if ended.seconds > QUICKLY + (0.5 * lab.seconds if phase in ("imports", "closing") else 0):
        case.note("hung", f"{what}: {ended.seconds:.1f} s\n{ended.output}")
    if case.check(ended, codes, what) and ended.code == 75 and not lab.steps(run):
        case.note("lost", f"{what}: exit code 75 without a checkpoint\n{ended.output}")
    if "\ncompiled the training step" in ended.output:
        lab.check_resumed(case, had, ended, what)


def wait_for_line(process: subprocess.Popen[str], mark: str | None, seconds: float) -> str:
    """The output of a process up to a line that begins with the mark, possibly after a timestamp."""
    deadline, read = time.monotonic() + seconds, ""
    assert process.stdout is not None
    while mark is not None and time.monotonic() < deadline:
        line = process.stdout.readline()
        read += line
        if not line or line.startswith(mark) or line.strip().partition(" s   ")[2].startswith(mark):
            break
    return read


def two(lab: Lab, count: int) -> list[Case]:
    """Runs the same command a second time while the first runs: one of them must train, the other refuse."""

    def attempt(case: Case) -> None:
        run, delay = lab.folder / f"two{case.seed}", case.seed / max(count - 1, 1) * lab.seconds
        first = lab.start(lab.command(run))
        time.sleep(delay)
        second = lab.train(run)
        ended = lab.end(first)
        case.check(ended, [0, 2], "the first")
        case.check(second, [0, 2], "the second")
        if (ended.code, second.code) == (2, 2):
            case.note("lost", f"both refused\n{ended.output}\n{second.output}")
        lab.finish(case, run, f"a second process after {delay:.1f} s")

    return [Case("two", f"delay {seed} of {count}", attempt, seed) for seed in range(count)]


def disk(lab: Lab, count: int) -> list[Case]:
    """File systems of various sizes that fill up, read-only ones, and limited file sizes."""
    needed = sum(path.stat().st_size for path in (lab.folder / "reference").rglob("*") if path.is_file()) * 2 >> 10

    def full(case: Case) -> None:
        size = max(8, needed * (case.seed + 1) // (count + 1))
        with small_disk(lab.folder / f"full{case.seed}", size) as mounted:
            ended = lab.train(mounted / "run")
            case.check(ended, [0, 2, 4], f"{size} kB")
            remount(mounted, f"size={needed * 4}k")
            lab.finish(case, mounted / "run", f"a disk of {size} kB, then a larger one")

    def read_only(case: Case) -> None:
        with small_disk(lab.folder / "read-only", needed * 4) as mounted:
            lab.copy(mounted / "run", steps=STEPS - 2 * EVERY)
            remount(mounted, "ro")
            case.check(lab.train(mounted / "run"), [2, 4], "read-only")
            remount(mounted, "rw")
            lab.finish(case, mounted / "run", "read-only, then not")

    def becomes_read_only(case: Case) -> None:
        with small_disk(lab.folder / "closing", needed * 4) as mounted:
            process = lab.start(lab.command(mounted / "run"))
            wait_for_step(lab, mounted / "run", 4)
            with contextlib.suppress(Skipped):  # an open file keeps it writable
                remount(mounted, "ro")
            case.check(lab.end(process), [0, 4], "becomes read-only")
            remount(mounted, "rw")
            lab.finish(case, mounted / "run", "read-only for a time")

    def limited(case: Case) -> None:
        size, run = (1 << 10) * 4 ** (case.seed % 5), lab.folder / f"limited{case.seed}"
        # Python ignores SIGXFSZ, so that a file that is too large is an OSError.
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        ended = lab.train(run, preexec_fn=limit)
        case.check(ended, [0, 2, 4], f"files of {size} bytes at most")
        lab.finish(case, run, "files of limited size")

    return [
        Case("disk", "read-only", read_only, 0),
        Case("disk", "becomes read-only", becomes_read_only, 0),
        *(Case("disk", f"full {seed}", full, seed) for seed in range(count)),
        *(Case("disk", f"limited {seed}", limited, seed) for seed in range(min(count, 5))),
    ]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[pathlib.Path]:
    """Mounts an in-memory file system of the given size."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True, check=False
    )
    if os.geteuid() != 0 or mounted.returncode:
        raise Skipped("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def remount(folder: pathlib.Path, options: str) -> None:
    """Changes the options of a mounted file system."""
    done = subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], capture_output=True, check=False)
    if done.returncode:
        raise Skipped(f"remount {options}: {done.stderr.decode(errors='replace').strip()}")


def wait_for_step(lab: Lab, run: pathlib.Path, step: int) -> None:
    """Waits until a step is saved, or the lab's patience runs out."""
    deadline = time.monotonic() + lab.patience
    while time.monotonic() < deadline and step not in lab.steps(run):
        time.sleep(0.01)
