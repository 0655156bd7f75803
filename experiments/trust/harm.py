"""Damaged checkpoints and other files, and hostile programs, attempted in processes of many attempts each.

As a program, `python harm.py KIND SEED COUNT FOLDER LAB` makes attempts of one kind, and prints a line of JSON before
and after each, which shows the attempt that ended or hung the process.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cheats
from clients import http
from families import FAMILIES
from fuzz import CPU_SECONDS, Faults, attempts
from lab import EVERY, QUICKLY, STEPS, Case, Lab
from mutate import damage

AT_ONCE = {"flips": 50, "sandbox": 1000, "http": 1000}
"""Attempts per process; 180 for other campaigns."""


def cases(lab: Lab, campaign: str, count: int) -> list[Case]:
    """The cases of a campaign; each comprises the attempts of one process."""

    at_once = AT_ONCE.get(campaign, 180)

    def attempt(case: Case) -> None:
        case.tried = 0
        folder = lab.folder / f"{campaign}{case.seed}"
        folder.mkdir()
        command = [sys.executable, __file__, campaign, str(case.seed), str(min(count, at_once)), str(folder)]
        ended = lab.end(lab.start([*command, str(lab.folder)]), 3 * lab.patience)
        open_name, others = "", []
        for line in ended.output.splitlines():
            if not line.startswith('{"begin"') and not line.startswith('{"end"'):
                others.append(line)
                continue
            message = json.loads(line)
            if "begin" in message:
                case.tried += 1
                open_name = message["begin"]
                continue
            open_name = ""
            for kind, text in message["faults"]:
                case.note(kind, f"{message['end']}: {text}")
        if open_name or ended.hung:
            hung = ended.hung or ended.code in (-signal.SIGALRM, -signal.SIGPROF)
            case.note("hung" if hung else "other", f"{open_name}: the process ended with {ended.code}")
        elif ended.code != 0:
            case.note("other", "\n".join([f"exit code {ended.code}", *others]))

    return [Case(campaign, f"{campaign} {seed}", attempt, seed) for seed in range(-(-count // at_once))]


def flips(seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """Damages or removes one file of the newest step, or replaces it with that of the previous step."""
    import jax
    import numpy as np

    from memjax.checkpoint import Checkpoints
    from memjax.config.load import load
    from memjax.config.run import RunConfig
    from memjax.errors import CheckpointError
    from memjax.runs.layout import DATA_ITER, META, OPT_STATE, PARAMS, TABLE_STATE, TABLES, params_to_tree
    from memjax.sharding.mesh import make_mesh
    from memjax.training.program import TrainProgram

    checkpoints = folder / "checkpoints"
    for step in (STEPS - EVERY, STEPS):
        shutil.copytree(lab / "reference/checkpoints" / str(step), checkpoints / str(step))
    config = load(RunConfig, lab / "reference/config.yaml")
    program, mesh = TrainProgram.of(config), make_mesh(config)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.shardings(mesh),
    )
    targets: dict[str, Any] = {
        PARAMS: params_to_tree(state.params),
        OPT_STATE: state.opt_state,
        TABLES: state.tables,
        TABLE_STATE: {"optimizer": state.table_state, "reads": state.reads, "step": state.step},
    }
    read = lambda step=None: Checkpoints(checkpoints).restore(targets, [DATA_ITER, META], step=step)
    as_bytes = lambda found: (
        [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.arrays)],
        json.dumps(found.documents, sort_keys=True),
    )
    right = {step: as_bytes(read(step)) for step in (STEPS - EVERY, STEPS)}
    files = sorted(path for path in (checkpoints / str(STEPS)).rglob("*") if path.is_file())
    rng = random.Random(f"flips {seed}")
    for _ in range(count):
        path = rng.choice(files)
        before = path.read_bytes()
        match rng.randrange(8):
            case 0:
                how, after = "removed", None
            case 1:
                other = checkpoints / str(STEPS - EVERY) / path.relative_to(checkpoints / str(STEPS))
                how, after = "from the step before", other.read_bytes() if other.is_file() else b""
            case _:
                how, after = damage(before, rng)
        name = f"{path.relative_to(checkpoints)} {how}"

        def attempt(path: pathlib.Path = path, before: bytes = before, after: bytes | None = after) -> Faults:
            path.unlink() if after is None else path.write_bytes(after)
            try:
                found = read()
            except CheckpointError as error:
                return [("lost", f"no step could be read: {error}")]
            finally:
                path.write_bytes(before)
            if found.step not in right:
                return [("wrong", f"step {found.step}")]
            return [] if as_bytes(found) == right[found.step] else [("wrong", f"step {found.step} has other values")]

        yield name, attempt


def sandbox(
    seed: int, count: int, folder: pathlib.Path, lab: pathlib.Path
) -> Iterator[tuple[str, Callable[[], Faults]]]:
    """Runs programs whose tests must not pass."""
    from memjax.evaluation.question_sets import sandbox
    from memjax.evaluation.question_sets.sandbox_launcher import PROCESSES

    tempfile.tempdir = str(folder)
    lacks, start = sandbox.missing_protection(), sandbox._START
    print(f"without: {', '.join(lacks) or 'nothing'}", flush=True)

    def attempt(source: str, start: str) -> Faults:
        faults: Faults = []
        sandbox._START = start
        if sandbox.run_program(*cheats.split(source), sandbox.Limits(cpu_seconds=1, seconds=3)).passed:
            faults.append(("wrong", "passed"))
        if left := list(folder.iterdir()):
            faults.append(("other", f"left {left}"))
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(folder) in path.read_text(errors="replace") and path.parent.name != str(os.getpid()):
                    faults.append(("other", "a process stays"))
        return faults

    killers = {} if PROCESSES in lacks else cheats.KILLERS
    attempts = [(name, source, start) for name, source in (cheats.FORGERIES | cheats.BURDENS | killers).items()]
    without = cheats.without_namespaces(start)
    attempts += [(f"{name}, without namespaces", source, without) for name, source in cheats.FORGERIES.items()]
    for name, source, start in attempts[:: -(-len(attempts) // count)]:
        yield name, lambda source=source, start=start: attempt(source, start)


def main() -> None:
    """Runs the attempts of one process."""
    kind, seed, count, folder, lab = sys.argv[1:]
    os.environ.setdefault("MEMJAX_COMPILE_CACHE", folder)
    place = pathlib.Path(folder)
    if kind == "http":
        made = http(int(seed), int(count), place)
    elif kind in FAMILIES:
        made = attempts(FAMILIES[kind], int(seed), int(count), place)
    else:
        made = {"flips": flips, "sandbox": sandbox}[kind](int(seed), int(count), place, pathlib.Path(lab))
    for name, attempt in made:
        print(json.dumps({"begin": name}), flush=True)
        # Nothing catches these signals: the process ends, and its last line shows where.
        signal.alarm(int(QUICKLY) + (140 if kind == "http" else 20))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS if kind in FAMILIES else 0)
        try:
            faults = attempt()
        except Exception:
            faults = [("tracebacks", traceback.format_exc())]
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps({"end": name, "faults": faults}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    main()
