"""Trains one model in two `jax.distributed` processes on one machine, kills one of them, and resumes.

`python experiments/bench/lost_process.py --devices 4 [--preset NAME] [--runs FOLDER] [--small]`. Each process drives
--devices GPUs. After a checkpoint the second is killed, and the first must end by itself within a minute. Both are
started again and resume from the newest checkpoint; SIGTERM to the second then stops both at the same saved step. With
--small (for CPUs) the model is tiny; processes with several CPU devices cannot work together, so --devices must be 1.
"""

import argparse
import pathlib
import shutil
import signal
import socket
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import cases
import timing
from commands import Command, Failed, Row, last_step, saved_step, write_corpus
from large_tables import LARGE, SMALL

from memjax.sharding.processes import LOST

COLUMNS = ("devices", "saved", "seconds to end", "exit code", "resumed from", "stopped at", "exit codes", "note")
ALLOWED = 60
"""Seconds from the kill to the end of the other process."""


def start(arguments: argparse.Namespace, run: pathlib.Path, name: str) -> list[Command]:
    """Starts both processes, each with its own devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each, small = arguments.devices, arguments.small
    words = f"--run.dir {run} --data.path {run.parent / 'corpus.jsonl'} --data.validation_fraction 0.05"
    words += f" --data.batch_size {2 * each * (2 if small else 4)} --mesh.memory {each} --train.steps 100000"
    words += " --checkpoint.every 5 --checkpoint.keep 1 --checkpoint.keep_best false --log.tensorboard false"
    words += f" --processes.count 2 --processes.coordinator 127.0.0.1:{port} --processes.heartbeat_timeout 10"
    words += SMALL if small else LARGE
    preset = str(cases.ROOT / f"configs/{arguments.preset}.yaml")
    settings = [preset, *words.split(), "--data.tokenizer", "{kind: byte}"]

    def one(index: int) -> Command:
        visible = ",".join(str(index * each + number) for number in range(each))
        log = arguments.out / "logs" / f"lost-process-{name}-{index}.log"
        more = ["--processes.index", str(index)]
        return Command("train", settings + more, log, CUDA_VISIBLE_DEVICES=visible, JAX_NUM_CPU_DEVICES=str(each))

    return [one(index) for index in range(2)]


def lose(arguments: argparse.Namespace, run: pathlib.Path) -> Row:
    """Kills the second process once there is a checkpoint, and waits for the first."""
    first, second = start(arguments, run, "lost")
    try:
        first.until(lambda: saved_step(run) > 0 and last_step(run) > saved_step(run), arguments.seconds)
        second.kill()
        killed = time.monotonic()
        code = first.end(ALLOWED)
    finally:
        first.kill()
        second.kill()
    row: Row = {"devices": f"2 x {arguments.devices}", "saved": saved_step(run), "exit code": code}
    if code not in (LOST, -signal.SIGABRT):
        raise Failed(f"exit code {code} of the process that was left: {first.tail()}")
    return row | {"seconds to end": time.monotonic() - killed}


def resume(arguments: argparse.Namespace, run: pathlib.Path, saved: int) -> Row:
    """Starts both again, lets them train, and stops both by a signal to the second."""
    both = start(arguments, run, "resumed")
    try:
        begun = f"resumed from step {saved}\n"
        both[0].until(lambda: begun in both[0].output and last_step(run) > saved, arguments.seconds)
        both[1].process.send_signal(signal.SIGTERM)
        codes = [command.end(arguments.seconds) for command in both]
    finally:
        for command in both:
            command.kill()
    row: Row = {"resumed from": saved, "stopped at": saved_step(run), "exit codes": codes}
    if codes != [75, 75] or saved_step(run) <= saved:
        raise Failed(f"exit codes {codes}, saved step {saved_step(run)}: {both[0].tail()}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="GPUs of each process")
    parser.add_argument("--preset", default="373m_memory_plus_1m")
    parser.add_argument(
        "--runs", type=pathlib.Path, default=pathlib.Path("runs/lost_process"), help="folder for checkpoints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--seconds", type=float, default=250, help="maximum time of a start or stop")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    arguments = parser.parse_args()
    arguments.out, runs = arguments.out.resolve(), arguments.runs.resolve()
    shutil.rmtree(runs, ignore_errors=True)
    write_corpus(runs / "corpus.jsonl", 200)
    row: Row = {}
    try:
        row |= lose(arguments, runs / "run")
        row |= resume(arguments, runs / "run", row["saved"])
    except Failed as error:
        row["note"] = str(error)
    record = {"command": f"python experiments/bench/lost_process.py --devices {arguments.devices}", "rows": [row]}
    stem = "lost-process" + ("-small" if arguments.small else "")
    what = {"title": "Two processes, one killed, on", "columns": COLUMNS, "key": ("devices",)}
    cases.write(arguments.out, stem, record | {"device": f"2 x {arguments.devices} devices"}, **what)
    print(timing.table([row], COLUMNS), flush=True)
    sys.exit("note" in row)


if __name__ == "__main__":
    main()
