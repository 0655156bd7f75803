"""What does a model forget when it learns new facts? See README.md.

python experiments/005_continual_learning/run.py --size small                              # CPU, minutes: a check
python experiments/005_continual_learning/run.py --data FOLDER --gpus 4 --seconds 540      # repeat until all is done
"""

import dataclasses
import functools
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

from continual.tables import LEARNED, TRIED, chosen, report
from factlab import command
from factlab.report import grouped
from factlab.runs import Result, Training

STAGES = ("bases", "grid", "between", "closer", "headline", "larger")
ROWS = (25, 50, 100, 200, 500, 1000)
"""t: rows of a table that a step may change."""
ROW_RATES = {"rowwise_adam": (0.1, 0.3, 1.0), "sgd": (100.0, 300.0, 1000.0)}
DENSE_RATES = {"lora": (1e-4, 3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
RANKS = (32, 128)
COMPARED = ("sparse", "lora", "full")
"""Methods also tested in parts, on CounterFact and on the larger base."""
LARGER = (
    *("--model.dim", "768", "--model.num_layers", "12", "--model.num_heads", "12", "--model.ffn_dim", "2048"),
    *("--model.memory.layers", "2,6,10", "--model.memory.num_keys", "1024", "--model.memory.key_dim", "384"),
    *("--model.memory.top_k", "32", "--optim.lr", "1.0e-3", "--optim.table.lr", "0.05"),
)
"""The base with the width and depth of 134m_memory_plus_1m, at half the learning rates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters that determine the cost."""

    old: int
    """Facts that the base is trained on."""
    new: int
    """Facts to learn."""
    edits: int
    """Facts of CounterFact."""
    parts: int = 10
    articles: int
    """Wikipedia articles that the base is trained on."""
    held_out: int
    """Characters of each held-out article."""
    background: int
    """Number of articles, and of statements, over which background reads are counted."""
    epochs: int
    """Passes over the facts to learn."""
    seeds: int
    settings: tuple[str, ...] = ()
    """Settings that override the base's YAML."""
    rows: tuple[int, ...] = ROWS
    few: tuple[int, ...] = (50, 500)
    """Values of t for the methods compared with sparse."""
    sgd_from: int = 200
    """Smallest t tried with SGD."""
    rates: int | None = None
    """Number of rates tried per method, from the second of its list; None: all."""


SIZES = {
    "full": Size(
        old=16_000,
        new=1000,
        edits=1000,
        articles=3000,
        held_out=4000,
        background=10_000,
        epochs=4,
        seeds=3,
        # Facts are short: a single thread builds batches at a quarter of the training speed.
        settings=("--data.num_workers", "4"),
    ),
    # Only shows that everything runs.
    "small": Size(
        old=24,
        new=4,
        edits=4,
        parts=2,
        articles=20,
        held_out=200,
        background=20,
        epochs=1,
        seeds=1,
        rows=(100,),
        few=(100,),
        rates=1,
        settings=(
            *("--model.dim", "32", "--model.num_layers", "2", "--model.num_heads", "2", "--model.ffn_dim", "64"),
            *("--model.vocab_size", "512", "--model.memory.layers", "1", "--model.memory.num_keys", "32"),
            *("--model.memory.num_heads", "2", "--model.memory.top_k", "4", "--model.memory.key_dim", "16"),
            *("--data.sequence_length", "64", "--data.batch_size", "8", "--train.steps", "20", "--eval.batches", "1"),
        ),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Training):
    """One method applied to one base; the seed is that of the base."""

    method: dict[str, Any]
    how: str
    """base (nothing is learned), together, in_parts, merged (ten patches) or edits (CounterFact)."""
    data: str
    work: str
    size: dict[str, Any]
    config: str = str((HERE / "base.yaml").relative_to(ROOT))
    larger: bool = False
    """Whether the base is LARGER."""
    seconds: float = 40.0

    @property
    def family(self) -> str:
        """Name of the method in tables."""
        return self.method["name"]

    @property
    def name(self) -> str:
        """A unique name."""
        told = " ".join(f"{name}{value}" for name, value in self.method.items() if value and name != "name")
        return f"{self.how} {self.family} {told} {'larger ' if self.larger else ''}base{self.seed}"

    @property
    def kind(self) -> tuple[Any, ...]:
        """Runs of one kind take about the same time."""
        return self.seed, self.how, self.larger

    def row(self) -> Result:
        """Its description in the results, without measures."""
        told = {name: value for name, value in self.method.items() if name not in ("name", "rows")}
        told["rows_given"] = self.method["rows"]
        return {
            "name": self.name,
            "stage": self.stage,
            "family": self.family,
            "how": self.how,
            "seed": self.seed,
            "larger": self.larger,
            **told,
        }


def main() -> None:
    options = command.parser(__doc__, stages=STAGES, sizes=tuple(SIZES), folder=HERE)
    options.add_argument("--data", type=pathlib.Path, help="folder with wiki, entity_questions and counterfact")
    options.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / "continual",
        help="folder for the bases",
    )
    arguments = options.parse_args()
    arguments.jobs = max(arguments.jobs, arguments.gpus)
    deadline = None if arguments.seconds is None else time.time() + arguments.seconds
    data = arguments.data
    work = arguments.work / arguments.size
    if data is None and arguments.size == "small":
        from continual.generated import write

        data = work / "data"
        write(data)
    if data is None and not (arguments.report or arguments.plan):
        options.error("--data names a folder with wiki, entity_questions and counterfact")
    size = SIZES[arguments.size]
    command.serve(
        arguments,
        HERE,
        lambda stage, results: list(runs_of(stage, results, size, str(data), str(work))),
        report,
        deadline=deadline,
        module="continual.worker",
        paths=[HERE],
        describe=described,
        keeps_order=True,
    )


def runs_of(stage: str, results: dict[str, Result], size: Size, data: str, work: str) -> Iterable[Run]:
    """The runs of a stage: all bases; a grid on the first, then rates between the grid's; then the chosen settings in
    parts, merged, on the other bases, on CounterFact, and on a larger base."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(size).items()
        if name not in ("settings", "rows", "few", "sgd_from", "rates")
    }
    make = functools.partial(
        Run, stage=stage, how="together", data=data, work=work, size=fields, settings=size.settings
    )
    if stage == "bases":
        yield from (make(method=_method("none", 0.0, size), how="base", seed=seed) for seed in range(size.seeds))
        return
    if stage == "grid":
        yield from (make(method=method) for method in _grid(size))
        return
    if stage in TRIED:
        before = TRIED[: TRIED.index(stage)]
        methods = _between([row for row in results.values() if row["stage"] in before])
        yield from (make(method=method) for method in methods)
        return
    picked = [_method_of(row) for row in chosen(results.values())]
    compared = [method for method in picked if method["name"] in COMPARED]
    if stage == "larger":
        settings = (*LARGER, *size.settings)
        for method in compared:
            yield make(method=method, larger=True, settings=settings, work=f"{work}/larger")
        return
    for method in compared:
        yield make(method=method, how="in_parts")
        if method["name"] not in DENSE_RATES:
            yield make(method=method, how="merged")
    for seed in range(1, size.seeds):
        yield from (make(method=method, seed=seed) for method in picked)
    yield from (make(method=method, how="edits") for method in compared)


def _between(tried: Iterable[Result]) -> Iterator[dict[str, Any]]:
    """For each method and its t or rank, the geometric mean of the highest rate that learns too little and the lowest
    that learns enough. For LoRA and full finetuning, if the lowest rate learns enough, a third of it."""
    alike = lambda row: (row["family"], row["rows_given"], row["rank"], row["optimizer"])
    for rows in grouped(tried, alike).values():
        enough = min((row["lr"] for row in rows if row["paraphrases"] >= LEARNED), default=0.0)
        # Rates above the lowest that learns enough may also learn too little, by being too high.
        less = max((row["lr"] for row in rows if row["lr"] < enough), default=0.0)
        if not enough or not (less or rows[0]["family"] in DENSE_RATES):
            continue
        lr = math.sqrt(less * enough) if less else enough / 3
        yield {**_method_of(rows[0]), "lr": float(f"{lr:.2g}")}


def _method_of(row: Result) -> dict[str, Any]:
    """The method of the run that gave the row."""
    last = {name: row[name] for name in ("rank", "optimizer", "epochs")}
    return {"name": row["family"], "lr": row["lr"], "rows": row["rows_given"], **last}


def _grid(size: Size) -> Iterator[dict[str, Any]]:
    few = lambda rates: rates if size.rates is None else rates[1:][: size.rates]
    method = functools.partial(_method, size=size)
    of_rows = [{"optimizer": name, "lr": lr} for name, rates in ROW_RATES.items() for lr in few(rates)]
    for rows in size.rows[::-1]:
        tried = (at for at in of_rows if at["optimizer"] != "sgd" or rows >= size.sgd_from)
        yield from (method("sparse", rows=rows, **at) for at in tried)
    yield from (method("full", lr, optimizer="adamw") for lr in few(DENSE_RATES["full"]))
    for rank in RANKS[: len(size.rows)]:
        yield from (method("lora", lr, rank=rank, optimizer="adamw") for lr in few(DENSE_RATES["lora"]))
    yield from (method("all_rows", **at) for at in of_rows)
    for name in ("tf_only", "random_rows"):
        for rows in size.few:
            yield from (method(name, lr, rows=rows) for lr in few(ROW_RATES["rowwise_adam"]))


def _method(name: str, lr: float, size: Size, **options: Any) -> dict[str, Any]:
    return {"name": name, "lr": lr, "rows": 0, "rank": 0, "optimizer": "rowwise_adam", "epochs": size.epochs, **options}


def described(result: Result) -> str:
    """Summary of a finished run, for its progress line."""
    learned = result.get("paraphrases", result.get("efficacy", 0.0))
    return f"learned {learned:.3f}, old lost {result['old_lost']:.3f}, bits {result['bits_more']:+.2%}"


if __name__ == "__main__":
    main()
