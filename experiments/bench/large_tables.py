"""Trains the presets with the largest tables, restores them on other meshes, and reads them from host memory.

`python experiments/bench/large_tables.py --devices 8 [--presets NAME ...] [--runs FOLDER] [--small]`. For each preset,
with the commands that a user runs:

train: 50 steps with the tables split over all devices, on texts whose loss falls within these steps; compares the
allocator's peak with the planner's prediction.
resume: resumes from the checkpoint on a mesh that splits the tables over half of the devices, and is killed after a few
steps, before it saves again.
evaluate: bits per byte of a text, with the tables split over all devices, and on one device with tables in host memory.

A checkpoint holds the table (137 and 275 GB in bfloat16) and three times the dense parameters: --runs must name a disk,
or memory such as /dev/shm, with enough space for one. Stages that succeeded are not repeated. With --small (for CPUs,
with JAX_NUM_CPU_DEVICES), the models are tiny.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import cases
import jax
import timing
from commands import Command, Failed, Row, last_step, metrics, saved_step, write_corpus

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.training.plan import memory as memory_plan

PRESETS = ("8b_memory_plus_16m", "1.3b_memory_plus_64m")
COLUMNS = ("preset", "stage", "mesh", "seconds", "first loss", "last loss", "peak GB", "predicted GB")
COLUMNS += ("predicted / peak", "tokens/s", "bits per byte", "bits per byte, host", "note")
STEPS, MORE = 50, 3
LARGE = """
--model.dtype bfloat16 --model.param_dtype bfloat16 --model.memory.table_dtype bfloat16 --data.sequence_length 4096
"""
SMALL = """
--model.dim 128 --model.num_layers 2 --model.num_heads 2 --model.num_kv_heads 2 --model.ffn_dim 64
--model.vocab_size 264 --model.memory.layers 0,1 --model.memory.num_keys 16 --model.memory.num_heads 2
--model.memory.top_k 4 --model.memory.key_dim 16 --data.sequence_length 32
--data.num_workers 0 --optim.table.state_columns 64 --optim.lr 1e-2
"""


class Runner:
    """The stages of one preset; each returns its row, or raises Failed."""

    def __init__(self, preset: str, arguments: argparse.Namespace, deadline: float):
        self.preset, self.arguments, self.deadline = preset, arguments, deadline
        self.run, self.corpus = arguments.runs / preset, arguments.runs / "corpus.jsonl"
        self.devices = arguments.devices

    @property
    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def settings(self, memory: int, steps: int) -> list[str]:
        sequences = (2 if self.arguments.small else 4) * self.devices
        words = f"--mesh.memory {memory} --train.steps {steps} --data.batch_size {sequences} --checkpoint.keep 1"
        words += f" --checkpoint.keep_best false --eval.batches 2 --data.validation_fraction 0.05 --run.dir {self.run}"
        words += f" --data.path {self.corpus} --log.tensorboard false {SMALL if self.arguments.small else LARGE}"
        words += f" --model.memory.value_dim {64 * self.devices}" if self.arguments.small else ""
        return [str(cases.ROOT / f"configs/{self.preset}.yaml"), *words.split(), "--data.tokenizer", "{kind: byte}"]

    def command(self, name: str, words: list[str], stage: str, **environment: str) -> Command:
        return Command(name, words, self.arguments.out / "logs" / f"{self.preset}-{stage}.log", **environment)

    def train(self) -> Row:
        write_corpus(self.corpus, 200 if self.arguments.small else 4000)
        command = self.command("train", self.settings(self.devices, STEPS), "train")
        if code := command.end(self.left):
            raise Failed(f"exit code {code}: {command.tail()}")
        rows = metrics(self.run)
        losses = [row["train/loss"] for row in rows]
        if saved_step(self.run) != STEPS or not losses[-1] < losses[0] - 0.1:
            raise Failed(f"saved step {saved_step(self.run)}; loss {losses[0]} at first, {losses[-1]} at last")
        predicted = memory_plan.plan(load(RunConfig, self.run / "config.yaml"), data_axis=1).total / 1e9
        row = {"mesh": f"data 1 x memory {self.devices}", "seconds": command.seconds, "predicted GB": predicted}
        row |= {"first loss": losses[0], "last loss": losses[-1], "tokens/s": rows[-1]["throughput/tokens_per_second"]}
        if peak := max(row.get("device/peak_bytes_in_use", 0) for row in rows):
            row |= {"peak GB": peak / 1e9, "predicted / peak": predicted * 1e9 / peak}
        return row

    def resume(self) -> Row:
        command = self.command("train", self.settings(self.devices // 2, 1000), "resume")
        try:
            command.until(lambda: last_step(self.run) >= STEPS + MORE, self.left)
        finally:
            command.kill()
        if f"resumed from step {STEPS}\n" not in command.output:
            raise Failed(f"not resumed from step {STEPS}: {command.tail()}")
        losses = {row["step"]: row["train/loss"] for row in metrics(self.run)}
        if abs(losses[STEPS + 1] - losses[STEPS]) > 0.3:
            raise Failed(f"the loss went from {losses[STEPS]} to {losses[STEPS + 1]}")
        mesh = f"data 2 x memory {self.devices // 2}"
        return {"mesh": mesh, "seconds": command.seconds, "first loss": losses[STEPS + 1]}

    def evaluate(self) -> Row:
        text = self.arguments.runs / "text.jsonl"
        text.write_text("".join(self.corpus.open().readlines()[:8]))
        words = [str(self.run), "--text", str(text), "--batch_size", str(self.devices), "--no-zero_tables"]
        started = time.monotonic()
        row: Row = {"mesh": f"memory {self.devices}; one device"}
        one = {"CUDA_VISIBLE_DEVICES": "0", "JAX_NUM_CPU_DEVICES": "1"}
        ways = {
            "bits per byte": (["--memory_devices", str(self.devices)], {}),
            "bits per byte, host": (["--table_place", "host", "--table_format", self.arguments.host_format], one),
        }
        for name, (more, environment) in ways.items():
            shutil.rmtree(self.run / "evals", ignore_errors=True)
            stage = f"evaluate-{'host' if environment else 'mesh'}"
            command = self.command("evaluate", [*words, *more], stage, **environment)
            if code := command.end(self.left):
                raise Failed(f"exit code {code}: {command.tail()}")
            (file,) = (self.run / "evals").glob("*.json")
            row[name] = json.loads(file.read_text())["bits_per_byte"]
        mesh, host = (row[name] for name in ways)
        if abs(host - mesh) > (1e-3 if self.arguments.host_format == "saved" else 1e-2) * mesh:
            raise Failed(f"{mesh} bits per byte on the mesh, {host} from host memory")
        return row | {"seconds": time.monotonic() - started}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # the commands use the devices
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="all devices of the machine, an even number")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--stages", nargs="+", default=["train", "resume", "evaluate"])
    parser.add_argument(
        "--runs", type=pathlib.Path, default=pathlib.Path("runs/large_tables"), help="folder for checkpoints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/bench/results"))
    parser.add_argument("--host_format", default="saved", help="table_format of the tables in host memory")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit: no stage starts later, or runs longer")
    parser.add_argument("--small", action="store_true", help="tiny models")
    arguments = parser.parse_args()
    arguments.runs, arguments.out = arguments.runs.resolve(), arguments.out.resolve()
    stem = "large-tables" + ("-small" if arguments.small else "")
    done = {(row["preset"], row["stage"]) for row in cases.read(arguments.out / f"{stem}.json").get("rows", [])
            if "note" not in row}  # fmt: skip
    record = {"command": f"python experiments/bench/large_tables.py --devices {arguments.devices}", "rows": []}
    deadline = time.monotonic() + arguments.seconds
    for preset in arguments.presets:
        runner = Runner(preset, arguments, deadline)
        stages: dict[str, Callable[[], Row]] = {name: getattr(runner, name) for name in arguments.stages}
        for stage, run in stages.items():
            if (preset, stage) in done:
                continue
            try:
                row = run() if time.monotonic() < deadline else {"note": "no time left"}
            except Failed as error:
                row = {"note": str(error)}
            record["rows"].append({"preset": preset, "stage": stage} | row)
            what = {"title": "The largest tables on", "columns": COLUMNS, "key": ("preset", "stage")}
            cases.write(arguments.out, stem, record | {"device": f"{arguments.devices} devices"}, **what)
            print(timing.table(record["rows"][-1:], COLUMNS), flush=True)
            if "note" in row:
                break
    sys.exit(any("note" in row for row in record["rows"]))


if __name__ == "__main__":
    main()
