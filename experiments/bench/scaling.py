"""Models the communication of a training step on many GPUs, and its cost: `python experiments/bench/scaling.py`.

Bytes follow from shapes alone: what each GPU receives over the links of its machine and through its network port, for
dense parameters, reads and row updates. Times use rates measured on one and two H200s (`results/`), except for the
network, whose rate is from a data sheet (one 400 Gb/s port per GPU). No communication is assumed to be hidden: on two
GPUs this matches the measured loss, since hidden communication slows down the computation that hides it. Latencies,
which grow with the number of GPUs, are ignored. --check compares the model with measurements.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import cases
import timing

from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.config.section import replaced
from memjax.io.files import write_atomic
from memjax.memory.row_grad_reduce import Collective
from memjax.models.counts import count_parameters, training_flops
from memjax.monitoring.metrics import PEAK_FLOPS
from memjax.ops.precision import resolve_dtype
from memjax.training.plan import memory as memory_plan
from memjax.training.plan.row_grad_reduce import plan_reduce
from memjax.training.program import TrainProgram

RESULTS = pathlib.Path(__file__).parent / "results"
MACHINE = 8
"""GPUs per machine, connected by links."""
PORT = 50e9
"""Bytes per second through a GPU's network port: 400 Gb/s."""
GPU_BYTES = 141e9
SPLIT = "data 1 x memory 2"
"""The measured mesh from which the links' rate is derived."""
MFU = {"373m, 64 M": 0.36}
"""MFU of one GPU if no step was measured; by default 0.4, as for 373m with 1 M slots. With 48 M slots it was 0.359."""
MODELS = {
    "373m, 1 M": ("373m_memory_plus_1m", ""),
    "373m, 16 M": ("373m_memory_plus_1m", "--model.memory.num_keys 4096"),
    "373m, 64 M": ("373m_memory_plus_1m", "--model.memory.num_keys 8192"),
    "1.3b, 1 M": ("1.3b_memory_plus_1m", "--mesh.memory 1"),
    "1.3b, 64 M": ("1.3b_memory_plus_64m", "--mesh.memory 1"),
    "8b, 16 M": ("8b_memory_plus_16m", "--mesh.memory 1 --train.remat block"),
}
PARTS = ("dense", "reads", "rows")
COLUMNS = ("model", "GPUs", "mesh", "collective", *(f"{part} GB" for part in PARTS), "port GB")
COLUMNS += (*(f"{part} ms" for part in PARTS), "update ms", "one GPU ms", "of one GPU", "at best", "GB a GPU")

Row = dict[str, Any]


class Sent(NamedTuple):
    """Bytes per GPU and step."""

    link: float = 0
    """Received over the links of the machine."""
    port: float = 0
    """Received through the GPU's network port."""

    def __add__(self, other: tuple) -> "Sent":
        return Sent(*(one + more for one, more in zip(self, other, strict=True)))

    def times(self, count: float) -> "Sent":
        return Sent(self.link * count, self.port * count)


class Group(NamedTuple):
    """The GPUs that take part in a collective, and how many of them share a machine."""

    size: int
    here: int

    def gather(self, total: float) -> Sent:
        """Bytes of an all-gather that ends with `total` bytes on each GPU, or of the transposed reduce-scatter."""
        from_outside = total * (1 - self.here / self.size)
        # The ports of a machine share the traffic from outside.
        return Sent(total * (1 - 1 / self.size), from_outside / self.here)

    def all_to_all(self, total: float) -> Sent:
        """Bytes of an all-to-all that leaves each GPU with `total` bytes."""
        return Sent(total * (self.here - 1) / self.size, total * (1 - self.here / self.size))


class Rates(NamedTuple):
    """Rates of one H200, in bytes per second unless stated otherwise."""

    link: float
    port: float
    copy: float
    """Bytes that its memory reads and writes per second."""
    pick: float
    """Seconds of a row update per pick and column."""
    row: float
    """Additional seconds of a row update per written row and column."""

    def seconds(self, sent: Sent) -> float:
        """Seconds of a collective: those of the slower path."""
        return max(sent.link / self.link, sent.port / self.port)

    def update(self, picks: float, slots: int, columns: int) -> float:
        """Seconds of a table's update by picks spread evenly over its slots."""
        return columns * (self.pick * picks + self.row * slots * -math.expm1(-picks / slots))


class Case:
    """The model of a preset, with a number of sequences per GPU."""

    def __init__(self, preset: str, settings: str = "", sequences: int = 4):
        types = [f"--model.{name} bfloat16" for name in ("dtype", "param_dtype", "memory.table_dtype")]
        words = " ".join([*types, "--train.remat none --optim.table.state_columns 64", settings]).split()
        self.config = load(RunConfig, cases.ROOT / f"configs/{preset}.yaml", words)
        self.sequences, self.tokens = sequences, sequences * self.config.data.sequence_length
        (self.table,) = self.config.model.tables.values()
        self.vector = self.table.width * resolve_dtype(self.config.model.dtype).itemsize
        """Size of a bag in bytes."""

    @cached_property
    def program(self) -> TrainProgram:
        return TrainProgram.of(self.config)

    def one_gpu(self, mfu: float) -> float:
        """Seconds of a step on one GPU."""
        flops = training_flops(self.program.parts, self.config.data.sequence_length).total
        return flops * self.tokens / (mfu * PEAK_FLOPS["NVIDIA H200"])

    def on(self, data: int, memory: int) -> RunConfig:
        """The config on a mesh."""
        return replaced(self.config, {"mesh.memory": memory, "data.batch_size": self.sequences * data * memory})

    def reads(self, data: int, memory: int) -> Sent:
        """Bytes of all lookups: picks of the group, bags and their cotangents, and the gradients of weights."""
        group, picks = Group(memory, min(memory, MACHINE)), memory * self.tokens * self.table.picks
        # Rematerialised blocks keep their sums, and send them once more.
        ways = 2 if self.config.train.remat == "none" else 3
        bags = group.all_to_all(self.tokens * self.vector).times(ways)
        return (group.gather(picks * 8) + bags + group.gather(picks * 4)).times(len(self.table.readers))

    def rows(self, data: int, memory: int, collective: Collective) -> Sent:
        """Bytes of the row gradients of all lookups."""
        here, lookups = min(MACHINE, data * memory), len(self.table.readers)
        every, replicas = Group(data * memory, here), Group(data, max(1, here // memory))
        # Picks without padding are gathered again; weights were already gathered for the reads.
        of_group = (
            Group(memory, min(memory, MACHINE)).gather(memory * self.tokens * self.table.picks * 4).times(lookups)
        )
        if collective == "all_reduce":
            columns = self.table.width // memory
            return of_group + replicas.gather(self.table.num_slots * (columns + 1) * 4).times(2)
        if data == 1:
            return of_group
        picks = every.gather(data * memory * self.tokens * self.table.picks * 8)
        return (picks + replicas.gather(data * self.tokens * self.vector)).times(lookups)

    def dense(self, data: int, memory: int, how: str = "sharded") -> Sent:
        """Bytes of the dense parameters, gathered for each pass, and of their gradients; none for a layer alone."""
        if how == "none":
            return Sent()
        passes = 2 if how == "replicated" else 3 if self.config.train.remat != "none" else 2
        total = count_parameters(self.program.parts).dense * resolve_dtype(self.config.model.dtype).itemsize
        return Group(data * memory, min(MACHINE, data * memory)).gather(total).times(passes)

    def update(self, rates: Rates, data: int, memory: int, collective: Collective) -> float:
        """Additional seconds of updating a GPU's columns, compared with all columns on one GPU."""
        own = self.tokens * self.table.picks * len(self.table.readers)
        slots, columns = self.table.num_slots, self.table.width // memory
        alone, everyone = rates.update(own, slots, self.table.width), rates.update(own * data * memory, slots, columns)
        if collective == "all_gather":
            return everyone - alone
        # Others' picks arrive summed; the dense sum is cleared, added to and read once more, which was not measured.
        others = rates.pick * own * (data - 1) * memory * columns
        return everyone - others - alone + 4 * slots * columns * 4 / rates.copy


@cache
def smallest() -> Case:
    """The model measured on two GPUs."""
    return Case("373m_memory_plus_1m")


def measured_rates(port: float = PORT) -> Rates:
    """Rates derived from the files in `results/`."""
    ops, profile = (json.loads((RESULTS / f"{name}-nvidia-h200.json").read_text()) for name in ("ops", "step-profile"))
    rows = [row for row in ops["rows"] if row["implementation"] == "triton" and row["indices"] == "uniform"]
    found = {(row["operation"], row["shape"].split(" x ")[0]): row["ms"] for row in rows}
    picks, name = ops["tokens"] * ops["picks"], "row_update rowwise_adam"
    updates = [(name, 1, 1 << 20), (f"{name}, 3 layers", 3, 1 << 20), (name, 1, 1 << 24)]
    touched = lambda layers, slots: slots * -math.expm1(-layers * picks / slots)
    work = np.array([(layers * picks * 1024, touched(layers, slots) * 1024) for _, layers, slots in updates])
    seconds = np.array([found[operation, f"{slots:,}"] / 1e3 for operation, _, slots in updates])
    by_pick, by_row = np.linalg.lstsq(work, seconds, rcond=None)[0].tolist()
    split = next(row for row in profile["rows"] if (row["case"], row.get("mesh")) == ("whole step, 2 of 2", SPLIT))
    collectives = statistics.mean([times["collectives ms a step"] for times in split["overlap"].values()]) / 1e3
    case = smallest()
    sent = case.dense(1, 2) + case.reads(1, 2) + case.rows(1, 2, "all_gather")
    return Rates(sent.link / collectives, port, ops["copy_bytes_per_second"], by_pick, by_row)


def step(case: Case, rates: Rates, data: int, memory: int, one_gpu: float, dense: str = "sharded") -> Row:
    """A step on a mesh, in milliseconds; `of one GPU` assumes that nothing is hidden, `at best` all that can be."""
    config = case.on(data, memory)
    planned = plan_reduce(config, data_axis=data)
    assert planned is not None
    sent = {
        "dense": case.dense(data, memory, dense),
        "reads": case.reads(data, memory),
        "rows": case.rows(data, memory, planned.chosen),
    }
    seconds = {name: rates.seconds(one) for name, one in sent.items()}
    update = case.update(rates, data, memory, planned.chosen)
    row: Row = {"GPUs": data * memory, "mesh": f"data {data} x memory {memory}", "one GPU ms": one_gpu * 1e3}
    row["collective"] = planned.chosen if data > 1 else None
    row |= {f"{name} ms": value * 1e3 for name, value in seconds.items()} | {"update ms": update * 1e3}
    row |= {f"{name} GB": one.link / 1e9 for name, one in sent.items()}
    row["port GB"] = sum(one.port for one in sent.values()) / 1e9
    row["ms"] = (one_gpu + sum(seconds.values()) + update) * 1e3
    row["of one GPU"] = one_gpu * 1e3 / row["ms"]
    row["at best"] = one_gpu / max(one_gpu + update + seconds["reads"], sum(seconds.values()))
    return row


def layouts(case: Case, rates: Rates, gpus: int, one_gpu: float) -> Iterator[Row]:
    """Every layout of the GPUs that can hold the model, according to the planner."""
    for memory in (1, 2, 4, 8, 16):
        if gpus % memory or case.table.width // memory < 64:
            continue
        config = case.on(gpus // memory, memory)
        # The shapes of all arrays are the same on every mesh.
        program = dataclasses.replace(case.program, config=config)
        held = memory_plan.plan(config, data_axis=gpus // memory, program=program)
        if held.total <= 0.95 * GPU_BYTES:
            yield step(case, rates, gpus // memory, memory, one_gpu) | {"GB a GPU": held.total / 1e9}


def check(rates: Rates) -> Iterator[Row]:
    """Predictions for the measured meshes, given the step on one of these GPUs."""
    rows = json.loads((RESULTS / "step-nvidia-h200.json").read_text())["rows"]
    found = {(row["case"], row["mesh"]): row["ms"] for row in rows if row["part"] == "devices"}
    case = smallest()
    layer = Case("373m_memory_plus_1m", "--model.memory.layers 4")
    for (name, mesh), ms in found.items():
        if " 2 of 2" not in name:
            continue
        data, memory = (int(word) for word in mesh.split() if word.isdecimal())
        alone = found[name.replace("2 of 2", "1 of 2"), "data 1 x memory 1"] / 1e3
        how = "none" if "layer" in name else "replicated" if "replicated" in name else "sharded"
        predicted = step(layer if "layer" in name else case, rates, data, memory, alone, how)["ms"]
        yield {"case": name, "mesh": mesh, "measured ms": ms, "predicted ms": predicted, "error": predicted / ms - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--port", type=float, default=PORT, help="bytes per second through a GPU's network port")
    parser.add_argument("--check", action="store_true", help="only compare the model with measurements")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the rows as JSON, and the best as a table")
    arguments = parser.parse_args()
    rates = measured_rates(arguments.port)
    checked, rows = list(check(rates)), []
    steps = json.loads((RESULTS / "step-nvidia-h200.json").read_text())["rows"]
    by_slots = {row.get("table parameters", 0): row["ms"] / 1e3 for row in steps if row["part"] in ("memory", "sizes")}
    for name in [] if arguments.check else arguments.models:
        case = Case(*MODELS[name])
        parameters = case.table.num_slots * case.table.width
        one_gpu = by_slots.get(parameters) if name.startswith("373m") else None
        one_gpu = one_gpu or case.one_gpu(MFU.get(name, 0.4))
        for gpus in arguments.gpus:
            found = sorted(layouts(case, rates, gpus, one_gpu), key=lambda row: row["ms"])
            rows += [{"model": name} | row for row in found]
    record = {"rates": rates._asdict(), "check": checked, "rows": rows}
    text = tables(record)
    print(text)
    if arguments.out:
        timing.write_record(arguments.out / "scaling-model.json", record)
        write_atomic(arguments.out / "scaling-model.md", text)


def tables(record: Row) -> str:
    """Measurements beside predictions, the layouts of 373m, and the best layouts of all models."""

    def show(rows: list[Row], columns: Sequence[str]) -> str:
        digits = {"ms": 1, "GB": 2, "GPU": 2, "best": 2}
        short = lambda name, value: f"{value:.{digits[name.split()[-1]]}f}" if isinstance(value, float) else value
        return timing.table([{name: short(name, row.get(name)) for name in columns} for row in rows], columns)

    rates, rows = record["rates"], record["rows"]
    best = {(row["model"], row["GPUs"]): row for row in reversed(rows)}
    parts = [
        "# What a step sends on many GPUs, by a model",
        f"Links: {rates['link'] / 1e9:.0f} GB/s received by a GPU; network ports: {rates['port'] / 1e9:.0f} GB/s.",
        "## Beside what was measured",
        timing.table(record["check"], ("case", "mesh", "measured ms", "predicted ms", "error")),
        "## Layouts of 373m with 1 M slots",
        show([row for row in rows if row["model"] == "373m, 1 M" and row["GPUs"] in (8, 64)], COLUMNS[1:]),
        "## The layout of the shortest step",
        show(list(reversed(best.values())), COLUMNS),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
