"""`python -m memjax.doctor`: what is installed, what this machine can run, and whether it computes correctly."""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from memjax.config import load as config_load
from memjax.io.command import exit_code
from memjax.io.ctrl_c import leave_after_output
from memjax.training.interrupt import SIGNALS

FLAGS = {"quick": "Skip the training run: check only versions, devices and operations."}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """No settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 0 if every check passes, 1 if not, 130 after a signal."""
    parsed = config_load.parse(
        DoctorConfig,
        argv,
        prog="python -m memjax.doctor",
        description=(
            "Shows versions, devices and which kernels can run here, checks every operation against its definition and "
            "trains a small model for a few steps. It takes about a minute."
        ),
        positional=None,
        flags=FLAGS,
    )
    return exit_code(lambda: _check(quick="quick" in parsed.flags))


def _check(*, quick: bool) -> int:
    checks = {"operations": _check_operations}
    if not quick:
        checks["training"] = check_training
    print(describe_machine(), flush=True)
    works = True
    for name, check in checks.items():
        print(f"\n{name}", flush=True)
        works &= check()
    print("\nall checks passed" if works else "\nsome checks failed; see the lines with FAILED")
    return 0 if works else 1


def describe_machine() -> str:
    """Versions, devices and implementations, one per line."""
    import jax

    from memjax.ops import dispatch
    from memjax.runs.environment import environment

    found = environment()
    lines = [f"{package:<17} {version or 'not installed'}" for package, version in found["versions"].items()]
    lines.append(f"{'python':<17} {found['python']}")
    for device in jax.local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 1e9:.1f} GB for JAX" if limit else ""
        lines.append(f"{'device':<17} {device.id}: {device.device_kind} ({device.platform}{memory})")
    default = dispatch.choose("embedding_bag", None)
    for name in dispatch.IMPLEMENTATIONS:
        reason = dispatch.why_not(name)
        state = f"cannot run: {reason}" if reason else "can run"
        lines.append(f"{name:<17} {state}{', the default here' if name == default else ''}")
    return "\n".join(lines)


def _check_operations() -> bool:
    """Compares every implementation that can run with the reference; prints a line for each."""
    from memjax.ops import dispatch, specs

    works = True
    for name in dispatch.IMPLEMENTATIONS:
        if name == "reference" or dispatch.why_not(name):
            continue
        for operation in specs.OPERATIONS:
            works &= _report(f"{operation} {name}", functools.partial(_compare, operation, name))
    return works


def _compare(operation: str, name: str) -> str:
    from memjax.ops import specs

    worst = specs.difference(operation, name)
    if not worst < 1e-4:
        raise ArithmeticError(f"differs from the definition by {worst:.1e} of the largest number")
    return f"ok, within {worst:.0e} of the definition"


def check_training() -> bool:
    """Trains the quick start's model for a few steps, saves and loads it, and generates; prints a line for each."""
    # The name is chosen before the folder exists, so that a signal in between leaves nothing behind.
    folder = os.path.join(tempfile.gettempdir(), f"memjax-doctor-{secrets.token_hex(8)}")
    try:
        os.mkdir(folder, 0o700)
        return _report("train and save", lambda: _in_thread(lambda: _train(folder))) and _report(
            "load and write", lambda: _write(folder)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


SETTINGS = ("--train.steps", "20", "--data.biographies.num_people", "20", "--eval.recall_people", "4")


def _train(folder: str) -> str:
    import json

    from memjax.config.run import RunConfig
    from memjax.training.main import train

    run = pathlib.Path(folder) / "run"
    # The run's log is not shown.
    with contextlib.redirect_stdout(io.StringIO()):
        code = train(config_load.load(RunConfig, None, [*SETTINGS, "--run.dir", str(run)]))
    if code:
        raise RuntimeError(f"training ended with exit code {code}")
    losses = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss rose from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"ok, the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"


def _in_thread(run: Callable[[], str]) -> str:
    """Runs training in a thread, where it handles no signals: here they end the report, and nothing is saved."""
    done: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def put() -> None:
        try:
            done.put(run())
        except Exception as error:
            done.put(error)

    threading.Thread(target=put, daemon=True).start()
    result = done.get()
    if isinstance(result, Exception):
        raise result
    return result


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _program() -> NoReturn:
    """Runs the command; any terminating signal ends it like Ctrl-C, leaving no temporary folder."""
    tempfile.gettempdir()  # writes a file the first time, which a signal would leave behind
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    leave_after_output(code)  # the training's thread may be in a long call


def _write(folder: str) -> str:
    from memjax.inference.streaming import generate
    from memjax.runs.load import load

    model, tokenizer = load(pathlib.Path(folder) / "run")
    tokens = list(generate(model, [tokenizer.bos_id, *tokenizer.encode("What")], max_tokens=8))
    return f"ok, {len(tokens)} tokens"


def _report(name: str, check: Callable[[], str]) -> bool:
    start = time.monotonic()
    try:
        result, works = check(), True
    except Exception as error:  # any failure is reported, and the report continues
        traceback.print_exc(file=sys.stderr)
        result, works = f"FAILED: {type(error).__name__}: {error}", False
    print(f"{name:<27} {result} ({time.monotonic() - start:.1f} s)", flush=True)
    return works


if __name__ == "__main__":
    _program()
