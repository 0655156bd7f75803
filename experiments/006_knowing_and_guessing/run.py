"""Does a model know what it does not know, and does its memory show it? See README.md.

python experiments/006_knowing_and_guessing/run.py --stage people questions --seconds 570
"""

import dataclasses
import functools
import operator
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from factlab import command
from factlab.report import Rows, draw, grouped, markdown, spread
from factlab.runs import Result, Run

MIDDLE_LR = 1e-3
PEOPLE = {"dense_x1": 0.0, "dense_x4": 0.0, "moe": 0.0, "peer": 2e-2, "memory": 3e-1, "memory_plus": 1e-1}
"""Families of 001, with the table rates of its full runs."""
QUESTIONS = {"dense_x1": 0.0, "dense_x4": 0.0, "memory_plus": 1e-1, "memory_plus_large": 1e-1}
"""Families of 002, with its table rates."""
TOLD = "0-1-2-4-8-16-32-64"
"""How often the facts of each person are stated, repeating after the eighth person."""
OUTPUTS = ("answer", "top", "margin", "entropy")
"""Signals that every model has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters that determine the cost."""

    people: int
    asked: int
    """Number of facts of EntityQuestions; those stated in training come first."""
    told: int
    exposures: float
    seeds: int
    settings: tuple[str, ...] = ()


SIZES = {
    "full": Size(people=128_000, asked=42_000, told=30_000, exposures=60, seeds=3),
    # Only shows that everything runs: minutes on a CPU.
    "small": Size(people=64, asked=300, told=200, exposures=5, seeds=1, settings=("--data.batch_size", "64")),
}


def main() -> None:
    options = command.parser(__doc__, stages=("people", "questions"), sizes=tuple(SIZES), folder=HERE)
    options.add_argument(
        "--facts",
        type=pathlib.Path,
        default=ROOT / "runs/entity_questions.npz",
        help="the file that 002's --prepare writes",
    )
    arguments = options.parse_args()
    if "questions" in arguments.stage and not (arguments.facts.exists() or arguments.plan or arguments.report):
        print(f"{arguments.facts}: there is no such file; make it with 002's --prepare first", file=sys.stderr)
        raise SystemExit(3)
    size = SIZES[arguments.size]
    # The stages are independent.
    command.serve(arguments, HERE, lambda stage, _: runs_of(stage, size, arguments.facts), report, awaited=())


def runs_of(stage: str, size: Size, file: pathlib.Path) -> list[Run]:
    """Every family with every seed."""
    if stage == "people":
        families, source, exposures = PEOPLE, "001_fact_capacity", 1.0
        facts: dict[str, Any] = {"people": size.people, "told": TOLD}
        tokens = size.people / 8 * sum(map(int, TOLD.split("-"))) * 6 * 14
    else:
        families, source, exposures = QUESTIONS, "002_real_facts", size.exposures
        facts = {"file": str(file), "count": size.asked, "told": size.told}
        tokens = size.told * size.exposures * 20
    return [
        Run(
            stage=stage,
            family=family,
            config=f"experiments/{source}/families/{family}.yaml",
            lr=MIDDLE_LR,
            table_lr=table_lr,
            exposures=exposures,
            facts=facts,
            seed=seed,
            settings=size.settings,
            measure="guessing",
            # Start and compilation, then tokens at the speed of one of four processes.
            seconds=60 + tokens / 1.5e6,
        )
        for seed in range(size.seeds)
        for family, table_lr in families.items()
    ]


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """The tables of each stage, and the figure of the stage `people`."""
    order = {"people": tuple(PEOPLE), "questions": tuple(QUESTIONS)}
    titles = {"people": "Generated people", "questions": "EntityQuestions"}
    parts = []
    for stage, families in order.items():
        some = [row for row in rows if row["stage"] == stage]
        some.sort(key=lambda row: (families.index(row["family"]), row["seed"]))
        groups = {family: runs for (family,), runs in grouped(some, lambda row: (row["family"],)).items()}
        if not groups:
            continue
        if stage == "people":
            picture(groups, folder / "knowing.png")
            parts.append("![recall and how well signals tell the told from the never told, by exposures](knowing.png)")
        seeds = max(map(len, groups.values()))
        fewer = [f"`{family}` {len(runs)}" for family, runs in groups.items() if len(runs) < seeds]
        if fewer:
            parts.append(f"{titles[stage]}: {seeds} seeds; of {', '.join(fewer)}.")
        parts += [
            f"{titles[stage]}: share correct by how often a fact was told, and answers about facts never told:",
            answered(groups),
            f"{titles[stage]}: AUROC of output signals, calibration, and wrong answers:",
            outputs(groups),
            f"{titles[stage]}: AUROC of memory signals, at the last token of the prompt / mean over the prompt:",
            memories(groups),
        ]
    return "\n\n".join(parts)


def _levels(row: Result) -> list[str]:
    """How often facts were stated, in ascending order, without 0."""
    return sorted((level for level in row["guessing"]["levels"] if level != "0"), key=int)


def answered(groups: dict[str, Rows]) -> str:
    """Recall by exposures, and the model's confidence where it cannot know the answer."""
    levels = _levels(next(iter(groups.values()))[0])
    head = ("family", *(f"told {level}x" for level in levels))
    head += ("never told: right", "mean probability", "probability at least 0.5")
    never = ("right", "probability", "confident")
    return markdown(
        head,
        [
            (f"`{family}`",)
            + tuple(_mean(runs, _at("levels", level, "right"), ".1%") for level in levels)
            + tuple(spread(runs, _at("levels", "0", name)) for name in never)
            for family, runs in groups.items()
        ],
    )


def outputs(groups: dict[str, Rows]) -> str:
    """AUROC of signals from the output, calibration, and errors by coverage."""
    most = _levels(next(iter(groups.values()))[0])[-1]
    head = ("family", *(f"told {most}x against never: {signal}" for signal in OUTPUTS))
    head += ("right against never told", "right against wrong", "calibration error, told", "never told")
    head += tuple(f"wrong at {share}" for share in ("50 %", "80 %", "95 %"))
    lines = []
    for family, runs in groups.items():
        cells = [_spread(runs, _at("signals", signal, most), ".3f") for signal in OUTPUTS]
        cells += [_spread(runs, _at("signals", "answer", against), ".3f") for against in ("known", "right")]
        cells += [_spread(runs, _at("calibration_error"), ".3f")]
        cells += [_spread(runs, _at("levels", "0", "calibration_error"), ".3f")]
        cells += [_spread(runs, _at("wrong_at", share)) for share in ("0.5", "0.8", "0.95")]
        lines.append((f"`{family}`", *cells))
    return markdown(head, lines)


def memories(groups: dict[str, Rows]) -> str:
    """AUROC of signals from the memory layers."""
    most = _levels(next(iter(groups.values()))[0])[-1]
    against = (most, "known", "right")
    lines = []
    for family, runs in groups.items():
        signals = [
            name for name in runs[0]["guessing"]["signals"] if f"{name}, prompt" in runs[0]["guessing"]["signals"]
        ]
        cell = lambda signal, which, runs=runs: _mean(runs, _at("signals", signal, which), ".3f")
        for signal in signals:
            cells = (f"{cell(signal, which)} / {cell(f'{signal}, prompt', which)}" for which in against)
            lines.append((f"`{family}`", signal, *cells))
    head = (
        "family",
        "layer and signal",
        f"told {most}x against never",
        "right against never told",
        "right against wrong",
    )
    return markdown(head, lines)


def _at(*path: str) -> Callable[[Result], Any]:
    """The value at a path in the measures."""
    return lambda row: functools.reduce(operator.getitem, path, row["guessing"])


def _spread(runs: Rows, value: Callable[[Result], Any], form: str = ".1%") -> str:
    """Mean, lowest and highest; empty if a run has no value, for example because it answers nothing correctly."""
    return "" if any(value(row) is None for row in runs) else spread(runs, value, form)


def _mean(runs: Rows, value: Callable[[Result], Any], form: str) -> str:
    values = [value(row) for row in runs]
    return "" if None in values else format(statistics.mean(values), form)


def picture(groups: dict[str, Rows], path: pathlib.Path) -> None:
    """Draws recall, and the AUROC of stated against never stated facts, by exposures."""
    recall, told, scores = {}, {}, {}
    for family, runs in groups.items():
        levels = _levels(runs[0])
        points = lambda *path, runs=runs, levels=levels, last=(): [
            (int(level), [_at(*path, level, *last)(row) for row in runs]) for level in levels
        ]
        recall[family] = points("levels", last=("right",))
        told[family] = points("signals", "answer")
        if family == "memory":
            scores = {"memory, key score": points("signals", "L2 score")}
    # Last, so that a family has the same colour in both panels.
    told |= scores
    panels = [
        ("Recall", "share of the facts", recall),
        ("Told against never told", "AUROC of the answer's probability or the score", told),
    ]
    draw(path, panels, "times a fact was told")


if __name__ == "__main__":
    main()
