"""Ctrl-C and SIGTERM end commands with one line whenever they arrive, and leave nothing half-written."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

LOST = """
import os, signal, sys, threading, time
from memjax.io import ctrl_c
from memjax.io.ctrl_c import Terminated, heard, run_command

class Loses:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        time.sleep(0.1)

def main():
    if sys.argv[1] == "ignored":
        os.kill(os.getpid(), signal.SIGINT)
        return 0
    if sys.argv[1] == "a thread at work":
        threading.Thread(target=time.sleep, args=[1000]).start()
    if sys.argv[1] == "lost":
        Loses(signal.SIGINT)
    elif sys.argv[1] == "lost SIGTERM":
        try:
            Loses(signal.SIGTERM)
            time.sleep(60)
        except Terminated:
            raise
        except KeyboardInterrupt:  # as a Ctrl-C that ends one text of several
            heard()
            return 1
    elif sys.argv[1] == "caught":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            pass
    elif sys.argv[1] == "another error":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None
    elif sys.argv[1] == "cleaning up":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            try:
                os.rmdir("not there")
            except OSError:
                time.sleep(0.3)
            print("cleaned up", file=sys.stderr)
    elif sys.argv[1] == "heard":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            heard()
        return signal.getitimer(signal.ITIMER_REAL) != (0, 0)  # it would be raised again
    else:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
    return 0

signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.default_int_handler)
ctrl_c._LOST_SECONDS = 0.1
run_command(main)
"""


@pytest.mark.parametrize(
    "how",
    [
        "raised",
        "lost",
        "lost SIGTERM",
        "caught",
        "heard",
        "ignored",
        "another error",
        "cleaning up",
        "a thread at work",
    ],
)
def test_ctrl_c_ends_a_command_with_one_line_whenever_it_comes(how):
    done = subprocess.run([sys.executable, "-c", LOST, how], capture_output=True, text=True, check=False, timeout=120)
    expected = (0, "") if how in ("heard", "ignored") else (130, "\ninterrupted\n")
    if how == "cleaning up":
        expected = (130, "cleaned up\n\ninterrupted\n")
    assert (done.returncode, done.stderr) == expected


WRITES = """
import sys, time
from memjax.io import ctrl_c
from memjax.io.ctrl_c import run_command
from memjax.runs.files import written_whole

ctrl_c._LOST_SECONDS = 0.1
ctrl_c._CLEANING_SECONDS = float(sys.argv[1]) if sys.argv[1:] else 60.0

def main():
    with written_whole("new") as folder:
        (folder / "part").write_bytes(b"half")
        try:
            print("writing", flush=True)
            time.sleep(60)
        finally:
            if sys.argv[1:]:
                print("cleaning up", flush=True)
                time.sleep(60)
    return 0

run_command(main)
"""


@pytest.mark.usefixtures("heeding_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_of_what_was_being_written(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITES]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == [".new.unfinished"]
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "\ninterrupted\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_second_sigterm_ends_a_command_that_is_busy_cleaning_up(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITES, "60"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("writing\n", "cleaning up\n"):
            assert process.stdout.readline() == line
            process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_command_does_not_clean_up_for_ever_after_sigterm(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITES, "0.3"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.terminate()
        assert process.wait(timeout=30) == 130


WITHOUT_FILES = """
import os
from memjax.io.ctrl_c import run_command
from memjax.training.interrupt import run_program

def main():
    with open("opened", "w") as file:
        os.write(1, b"of a library")
        os.write(2, b"of a library")
        return file.fileno()

RUN(main)
"""


@pytest.mark.parametrize("runs", ["run_command", "run_program"])
def test_without_standard_output_libraries_do_not_print_into_files(tmp_path, runs):
    program = shlex.quote(WITHOUT_FILES.replace("RUN", runs))
    command = f"exec {sys.executable} -c {program} <&- >&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False
    )
    assert done.returncode > 2, "a file has taken the descriptor of an output"
    assert (tmp_path / "opened").read_bytes() == b""


STREAMS = """
import sys
from memjax.io.ctrl_c import run_command
from memjax.training.interrupt import run_program

def main():
    print("a diagnostic", file=sys.stderr)
    print(sys.stdin.isatty(), repr(sys.stdin.read()))

RUN(main)
"""


@pytest.mark.parametrize("runs", ["run_command", "run_program"])
def test_without_standard_error_its_text_is_dropped_and_a_missing_input_is_empty(runs):
    program = shlex.quote(STREAMS.replace("RUN", runs))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", "-c", f"exec {sys.executable} -c {program} <&- 2>&-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert done.stdout == "False ''\n"
