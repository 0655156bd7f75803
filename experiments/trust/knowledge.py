"""kill -9 while facts are learned and patches applied or reverted: the model must be the one before or after."""

import contextlib
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
from lab import Case, Lab

FACTS = [{"prompt": "alpha beta", "answer": "gamma"}, {"prompt": "delta", "answer": "epsilon", "paraphrases": ["beta"]}]
LEARN = ("--epochs", "2", "--replay", "2", "--rows", "8", "--background_texts", "20")
KILLS = 5
"""Kills per case."""
_making = threading.Lock()


def patches(lab: Lab, count: int) -> list[Case]:
    """Kills `learn`, `patch apply` and `patch revert` at random times during their run."""

    def attempt(case: Case) -> None:
        with _making:
            patch, seconds = made(lab)
        run, random = lab.copy(lab.folder / f"patched{case.seed}"), case.random
        before = table(run)
        after = table(run, patch)
        case.tried = 0
        for _ in range(KILLS):
            action = random.choice(["learn", "apply", "revert"])
            process = lab.start(command(lab, action, run, patch, run / "learned"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.1, 1.0) * seconds[action])
            process.kill()
            lab.end(process)
            case.tried += 1
            if not any(np.array_equal(table(run), whole) for whole in (before, after)):
                case.note("wrong", f"{action} killed: the table is neither that before nor that after")
            if (run / "learned").exists() and (written := list((run / "learned").glob("*.safetensors"))):
                shown = lab.end(lab.start([sys.executable, "-m", "memjax.patch", "show", str(written[0])]))
                case.check(shown, [0], "a patch that a killed learn has left")
        applied = np.array_equal(table(run), after)
        for action, expected in (("revert", before),) if applied else (("apply", after), ("revert", before)):
            ended = lab.end(lab.start(command(lab, action, run, patch, run / "learned")))
            if case.check(ended, [0], f"{action} after {case.tried} kills") and not np.array_equal(
                table(run), expected
            ):
                case.note("wrong", f"{action} after {case.tried} kills: another table")

    return [Case("patches", f"chain {seed}", attempt, seed) for seed in range(count)]


def made(lab: Lab) -> tuple[pathlib.Path, dict[str, float]]:
    """A patch for the undisturbed run, and the seconds that each command takes; created by the first case."""
    folder, times = lab.folder / "patch", lab.folder / "patch.json"
    if not times.exists():
        (lab.folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS), encoding="utf-8")
        run, seconds = lab.copy(lab.folder / "patched"), {}
        for action in ("learn", "apply", "revert"):
            started = time.monotonic()
            ended = lab.end(lab.start(command(lab, action, run, folder, folder)))
            seconds[action] = time.monotonic() - started
            if ended.code != 0:
                raise RuntimeError(f"{action} ends with {ended.code}:\n{ended.output}")
        times.write_text(json.dumps(seconds), encoding="utf-8")
    return folder, json.loads(times.read_text(encoding="utf-8"))


def command(lab: Lab, action: str, run: pathlib.Path, patch: pathlib.Path, out: pathlib.Path) -> list[str]:
    """The command line of an action."""
    if action == "learn":
        facts = str(lab.folder / "facts.jsonl")
        return [sys.executable, "-m", "memjax.learn", str(run), facts, "--out", str(out), *LEARN]
    return [sys.executable, "-m", "memjax.patch", action, str(run), str(patch)]


def table(run: pathlib.Path, *patches: pathlib.Path) -> np.ndarray:
    """The rows of the run's table, as loaded by `memjax.load`."""
    from memjax.models.parts import split_decoder
    from memjax.runs.load import load

    (rows,) = split_decoder(load(run, patches=patches).model)[2].values()
    return np.asarray(rows)
