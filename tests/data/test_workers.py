"""Worker processes end at once, whatever they are doing, and leave nothing behind."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from memjax.config.data import DataConfig, TokenizerConfig
from memjax.data.dataset import open_dataset
from memjax.data.loader import TrainingData
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.data.workers import Workers
from memjax.errors import DataError

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
PROGRAM = """
import sys, time
from memjax.config.data import DataConfig, TokenizerConfig
from memjax.data.dataset import open_dataset
from memjax.data.loader import TrainingData
from memjax.data.tokenizers.base import ByteTokenizer

if __name__ == "__main__":
    config = DataConfig(
        source="text", path=sys.argv[1], batch_size=32, sequence_length=2048, num_workers=2,
        tokenizer=TokenizerConfig(kind="byte"),
    )
    data = TrainingData(open_dataset(config, ByteTokenizer()), seed=0)
    next(data)
    print(*(process.pid for process, _ in data._open[0]._running), flush=True)
    sys.stdin.readline()
    next(data), next(data), next(data)
    print("three more", flush=True)
"""


def config(tmp_path, *, large: bool, workers: int = 2) -> DataConfig:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i} " * 200 for i in range(300)))
    rows, length = (32, 2048) if large else (2, 16)
    return DataConfig(
        source="text",
        path=str(path),
        batch_size=rows,
        sequence_length=length,
        num_workers=workers,
        tokenizer=TokenizerConfig(kind="byte"),
    )


def is_gone(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(done) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_closing_is_prompt_with_full_queues_and_in_the_middle_of_a_batch(tmp_path, large):
    shared_memory = set(os.listdir("/dev/shm"))
    for seconds in (0, 1.5):
        data = TrainingData(open_dataset(config(tmp_path, large=large), ByteTokenizer()), seed=0)
        next(data)
        time.sleep(seconds)
        workers = [process.pid for process, _ in data._open[0]._running]
        data.close()
        assert len(workers) == 2
        assert all(map(is_gone, workers))
    assert not set(os.listdir("/dev/shm")) - shared_memory


def test_closing_before_the_first_batch_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "_start", lambda _: pytest.fail("they were started"))
    data = TrainingData(open_dataset(config(tmp_path, large=True, workers=8), ByteTokenizer()), seed=0)
    data.get_state()
    data.close()
    assert list(data) == []


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGKILL, r"-9; .*data\.num_workers lower"), (signal.SIGSEGV, r"-11; a crash of")]
)
def test_a_killed_worker_is_reported_as_such(tmp_path, number, told):
    data = TrainingData(open_dataset(config(tmp_path, large=True), ByteTokenizer()), seed=0)
    next(data)
    process, _ = data._open[0]._running[1]
    os.kill(process.pid, number)
    with pytest.raises(DataError, match=rf"data worker 1 ended with exit code {told}"):
        list(itertools.islice(data, 10))
    assert list(data) == []


def test_a_script_without_a_main_guard_gets_a_hint(tmp_path):
    config(tmp_path, large=False)
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "a.txt")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "data worker 0 ended with exit code 1; it has printed why" in last
    assert "guard its entry point with `if __name__ == '__main__':`" in last


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_workers_outlive_signals_to_their_group_but_not_their_parent(tmp_path, name):
    path = config(tmp_path, large=True).path
    command = [sys.executable, "-c", PROGRAM, path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as program:
        assert program.stdout
        assert program.stdin
        workers = list(map(int, program.stdout.readline().split()))
        assert len(workers) == 2
        if name == "SIGKILL":
            program.kill()
        else:  # sent by launchers to all processes of a job; the program treats it as a request to save
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            print(file=program.stdin, flush=True)
            assert program.stdout.readline() == "three more\n"
    wait_until(lambda: all(map(is_gone, workers)))
