"""Ctrl-C ends commands in a line, wherever it comes."""

import subprocess
import sys

import pytest

LOST = """
import os, signal, sys, threading, time
from memjax.io import ctrl_c
from memjax.io.ctrl_c import heard, run_command

class Loses:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def main():
    if sys.argv[1] == "ignored":
        os.kill(os.getpid(), signal.SIGINT)
        return 0
    if sys.argv[1] == "a thread at work":
        threading.Thread(target=time.sleep, args=[1000]).start()
    if sys.argv[1] == "lost":
        Loses()
    elif sys.argv[1] == "caught":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            pass
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


@pytest.mark.parametrize("how", ["raised", "lost", "caught", "heard", "ignored", "cleaning up", "a thread at work"])
def test_ctrl_c_ends_a_command_in_a_line_wherever_it_comes(how):
    done = subprocess.run([sys.executable, "-c", LOST, how], capture_output=True, text=True, check=False, timeout=120)
    expected = (0, "") if how in ("heard", "ignored") else (130, "\ninterrupted\n")
    if how == "cleaning up":
        expected = (130, "cleaned up\n\ninterrupted\n")
    assert (done.returncode, done.stderr) == expected
