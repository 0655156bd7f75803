"""Signals set a flag if there is something to save, and end the program otherwise."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from memjax.training import interrupt
from memjax.training.interrupt import SAVED, SIGNALS, catch_interrupts

NAMES = ("TERM", "INT", "HUP", "USR1", "USR2", "XCPU")

PROGRAM = """
import hashlib, sys, time
from memjax.training.interrupt import SAVED, catch_interrupts, run_program

def main():
    where = sys.argv[1]
    with catch_interrupts() as interrupt:
        if where == "saved":
            interrupt.exit_code = SAVED
        if where == "finish":
            with interrupt.deferred():
                interrupt.exit_code = SAVED
        if where != "loop":
            print("ready", flush=True)
        if where == "library":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which no handler of Python runs
        if where == "loop":
            with interrupt.deferred():
                print("ready", flush=True)
                while interrupt.name is None:
                    time.sleep(0.01)
                print("saved", flush=True)
                raise SystemExit(75)
        time.sleep(1000)

run_program(main)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=pipe, stderr=pipe, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.usefixtures("heeding_hangups")
def test_every_signal_that_ends_programs_is_caught():
    assert {number.name for number in SIGNALS} == {f"SIG{name}" for name in NAMES}
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with catch_interrupts(at_once=False, quiet=True) as caught:
            os.kill(os.getpid(), number)
            assert caught.name == number.name
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_nested_blocks_share_one_flag():
    with catch_interrupts(at_once=False, quiet=True) as outer:
        with catch_interrupts(at_once=False, quiet=True) as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) is outer


def test_a_run_in_a_thread_does_without_signals():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with catch_interrupts() as caught:
            found.append((caught.name, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(None, True)]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["under nohup", "in the background of a script"])
def test_what_is_ignored_from_the_start_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with catch_interrupts(at_once=False) as caught:
            os.kill(os.getpid(), number)
            assert caught.name is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("where", "code"), [("start", 130), ("saved", SAVED), ("library", 130), ("finish", SAVED)])
def test_without_anything_to_save_a_signal_ends_the_program_at_once(where, code):
    with start(where) as process:
        process.send_signal(signal.SIGUSR2)
        out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "")
    assert error.strip().startswith("SIGUSR2: ")
    assert len(error.strip().splitlines()) == 1, error


def test_copies_of_a_signal_do_not_stop_the_save():
    with start("loop") as process:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, "saved\n"), error
    # Signals that arrive together may be delivered in any order.
    assert error in ("\nSIGTERM: saving after this step\n", "\nSIGINT: saving after this step\n")


@pytest.mark.parametrize(("numbers", "ends"), [("TERM TERM", True), ("USR1 INT", True), ("USR1 TERM XCPU", False)])
def test_a_later_ctrl_c_or_second_sigterm_ends_the_program_without_a_save(monkeypatch, numbers, ends):
    now = 100.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    monkeypatch.setattr(interrupt, "leave", sys.exit)
    caught = interrupt.Interrupt(at_once=False, quiet=True)
    *first, last = (getattr(signal, f"SIG{name}") for name in numbers.split())
    for number in first:
        caught(number)
        now += 10
    with pytest.raises(SystemExit, match="130") if ends else contextlib.nullcontext():
        caught(last)


AT_EXIT = """
import atexit, os, signal
from memjax.training.interrupt import SIGNALS, run_program

atexit.register(lambda: [os.kill(os.getpid(), number) for number in SIGNALS])
run_program(lambda: 3)
"""


def test_a_late_signal_does_not_change_the_exit_code():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")


STUCK = """
import atexit, threading, time
from memjax.monitoring.trackers.tracker import Tracker
from memjax.training.interrupt import run_program

def main():
    tracker = Tracker("log.slow", lambda: time.sleep(1000))
    tracker.wait(0.05)
    atexit.register(time.sleep, 1000)
    print("done")
    return 0

run_program(main)
"""


def test_a_service_that_does_not_answer_does_not_hold_up_the_end():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "it does not finish" in done.stderr
