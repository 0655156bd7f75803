"""Blocked signals stay pending, and the resource tracker ignores signals to its process group."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from memjax.io.children import blocked

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_blocked_signal_waits_whatever_thread_the_system_gives_it_to():
    ended, done = threading.Event(), []
    thread = threading.Thread(target=ended.wait)
    thread.start()

    def interrupted():
        with blocked([signal.SIGINT]):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            done.append("inside")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ended.set()
    thread.join()


TRACKED = """
import os, signal, time
from multiprocessing import resource_tracker
from memjax.io.children import start_tracker

start_tracker()
tracker = resource_tracker._resource_tracker._pid
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    os.kill(tracker, number)
    time.sleep(0.2)
    assert os.waitpid(tracker, os.WNOHANG) == (0, 0), number
"""


def test_signals_to_the_process_group_do_not_end_the_resource_tracker():
    done = subprocess.run(
        [sys.executable, "-c", TRACKED], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
