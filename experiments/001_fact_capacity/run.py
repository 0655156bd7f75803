"""How much do dense, expert and memory models remember of generated biographies? See README.md.

    python experiments/001_fact_capacity/run.py --stage gate grid full --seconds 570

runs what has no result yet and fits the time; the same command continues later. `--plan` lists the runs instead.
"""

import dataclasses
import pathlib
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT), str(HERE)]

import why
from factlab import command
from factlab.report import bits_per_parameter, draw, grouped, markdown, millions, settings, spread, write_into
from factlab.runs import Result, Run, read_results

SUMMARY = "<!-- made by experiments/001_fact_capacity/run.py --report -->"
STAGES = ("gate", "grid", "full", "edges", "why")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters that determine the cost."""

    people: int
    exposures: float
    grid_exposures: float
    gate_people: int
    gate_exposures: float
    why_exposures: float
    seeds: int
    num_rates: int
    """Number of learning-rate pairs tried per family."""
    settings: tuple[str, ...] = ()


SIZES = {
    "full": Size(
        people=60_000,
        exposures=60,
        grid_exposures=20,
        gate_people=24_000,
        gate_exposures=48,
        why_exposures=40,
        seeds=3,
        num_rates=3,
    ),
    # Only shows that everything runs: minutes on a CPU.
    "small": Size(
        people=50,
        exposures=30,
        grid_exposures=10,
        gate_people=50,
        gate_exposures=10,
        why_exposures=10,
        seeds=1,
        num_rates=1,
        settings=("--data.batch_size", "64"),
    ),
}

MIDDLE_LR = 1e-3
DENSE = ((MIDDLE_LR, 0.0), (5e-4, 0.0), (2e-3, 0.0))
SPARSE = ((MIDDLE_LR, 1e-1), (MIDDLE_LR, 2e-2), (MIDDLE_LR, 3e-1))
"""Peak learning rates of the dense parameters and of the tables."""
GATE_SETTINGS = ("--data.batch_size", "1024")
UNIT_EMBEDDING = ("--model.embedding_init_std", "1.0")
NARROW_EMBEDDING = ("--model.embedding_init_std", "null")
"""Initialises with a standard deviation of dim ** -0.5."""
RATES = {
    "dense_x1": DENSE,
    "dense_x2": DENSE,
    "dense_x4": DENSE,
    "moe": DENSE,
    "peer": SPARSE,
    "memory": SPARSE,
    "memory_plus": SPARSE,
}
BEYOND = {"memory": (MIDDLE_LR, 1.0), "peer": (MIDDLE_LR, 5e-3)}
"""Families whose best rate lies at the edge of the grid, with the next rate: reported only, it changes nothing."""
RATES_OF = {"memory_plus_small": "memory_plus", "memory_plus_large": "memory_plus"}
"""Families that use the rates found for another."""

NAMES = {
    "dense_x1": "dense",
    "dense_x2": "dense, twice the arithmetic",
    "dense_x4": "dense, four times the arithmetic",
    "moe": "mixture of 21 experts",
    "peer": "PEER, 32,400 experts",
    "memory": "one memory layer, 65,536 slots",
    "memory_plus_small": "Memory+, two layers share 16,384 slots",
    "memory_plus": "Memory+, 65,536 slots",
    "memory_plus_large": "Memory+, 262,144 slots",
}
ORDER = tuple(NAMES)
"""Order of the families in tables."""


def main() -> None:
    arguments = command.parser(__doc__, stages=STAGES, sizes=tuple(SIZES), folder=HERE).parse_args()
    size = SIZES[arguments.size]
    command.serve(arguments, HERE, lambda stage, results: runs_of(stage, size, results), report)
    if arguments.report:
        rows = list(read_results(HERE / "results" / "full.json").values())
        write_into(ROOT / "README.md", summary(rows), begin=SUMMARY)


def runs_of(stage: str, size: Size, results: dict[str, Result]) -> list[Run]:
    """The runs of a stage; the stage `full` uses the best rates of the grid."""
    if stage == "gate":
        return gate(size)
    if stage == "grid":
        # A single setting per family is not a grid.
        tried_rates = RATES.items() if size.num_rates > 1 else ()
        return [
            a_run(stage, size, family, rates, size.grid_exposures)
            for family, tried in tried_rates
            for rates in tried[: size.num_rates]
        ]
    if stage == "edges":
        beyond = BEYOND.items() if size.num_rates > 1 else ()
        return [a_run(stage, size, family, rates, size.grid_exposures) for family, rates in beyond]
    if stage == "why":
        return whys(size)
    return [
        a_run(stage, size, family, best_rates(RATES_OF.get(family, family), results), size.exposures, seed=seed)
        for seed in range(size.seeds)
        for family in [*RATES, *RATES_OF]
    ]


def gate(size: Size) -> list[Run]:
    """Dense rates by embedding scale, table rates by key rate, placements, and the control."""
    gate_size = dataclasses.replace(size, people=size.gate_people, settings=size.settings or GATE_SETTINGS)

    def one(family, rates, embedding=UNIT_EMBEDDING, layers="1,2", settings=(), **options):
        placed = ("--model.memory.layers", layers) if family == "memory_plus" else ()
        settings = (*embedding, *placed, *settings)
        return a_run("gate", gate_size, family, rates, size.gate_exposures, settings=settings, **options)

    dense = [one("dense_x1", rates, scale) for rates in DENSE for scale in (UNIT_EMBEDDING, NARROW_EMBEDDING)]
    keys = ((), ("--optim.key_lr_factor", "1.0"))
    memory = [one("memory_plus", rates, settings=factor) for rates in SPARSE for factor in keys]
    others = [one("memory_plus", SPARSE[0], layers=which) for which in ("1,3", "2")]
    others += [one("memory_plus", SPARSE[0], NARROW_EMBEDDING), one("memory_plus", SPARSE[0], perfect_address=True)]
    if size.num_rates == 1:
        return [dense[0], others[-1]]
    return [*dense, *memory, *others, one("dense_x4", DENSE[0])]


def whys(size: Size) -> list[Run]:
    """From the plain layer to Memory+, one change at a time."""
    chosen = list(why.variants())
    # At the small size, only what no other stage runs.
    chosen = chosen if size.num_rates > 1 else [one for one in chosen if one.without == "gate_proj"]
    return [
        a_run(
            "why",
            size,
            "memory",
            (MIDDLE_LR, one.design.table_lr),
            size.why_exposures,
            seed=seed,
            settings=one.all_settings,
            without=one.without,
        )
        for seed in range(size.seeds)
        for one in chosen
    ]


def a_run(stage, size, family, rates, exposures, *, seed=0, settings=(), perfect_address=False, without="") -> Run:
    lr, table_lr = rates
    return Run(
        stage=stage,
        family=family,
        config=str((HERE / "families" / f"{family}.yaml").relative_to(ROOT)),
        lr=lr,
        table_lr=table_lr,
        exposures=exposures,
        facts={"people": size.people},
        seed=seed,
        settings=(*size.settings, *settings),
        perfect_address=perfect_address,
        without=without,
        # Start and compilation, then tokens at the speed of one of four processes.
        seconds=40 + exposures * size.people * 6 * 14 / 2e6,
    )


def best_rates(family: str, results: dict[str, Result]) -> tuple[float, float]:
    """The rates with the best recall in the grid; the middle ones if it has not been run."""
    tried = [row for row in results.values() if row["stage"] == "grid" and row["family"] == family]
    if not tried:
        return RATES[family][0]
    best = max(tried, key=lambda row: (row["recall"], row["stored_bits"]))
    return best["lr"], best["table_lr"]


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """The tables of all stages, repeated runs, and the figure."""
    of_stage = lambda stage: sorted((row for row in rows if row["stage"] == stage), key=table_order)
    parts = []
    if full := grouped(of_stage("full"), lambda row: (row["family"],)):
        picture(full, folder / "recall.png")
        head = ("family", "FLOPs per token", "dense", "tables, experts", "lr, of tables", "recall", "tables zeroed")
        head += ("stored kbit", "bits per parameter")
        parts += ["![recall and bits per parameter against the arithmetic of the training](recall.png)"]
        parts += [markdown(head, [headline(family, runs) for (family,), runs in full.items()])]
    if again := read_results(folder / "results" / "again.json"):
        parts += ["Retrained from scratch with the same seed (`results/again.json`):", repeated(rows, again)]
    parts += why.tables(of_stage("why"))
    for stage in ("grid", "edges", "gate"):
        if found := of_stage(stage):
            head = ("family", "lr", "of tables", "settings", "recall", "stored kbit")
            tried = [
                (
                    f"`{row['family']}`",
                    f"{row['lr']:g}",
                    f"{row['table_lr']:g}" if row["table_lr"] else "",
                    settings(row),
                )
                + (f"{row['recall']:.1%}", f"{row['stored_bits'] / 1e3:.0f}")
                for row in found
            ]
            exposures = found[0]["exposures"]
            parts += [f"{stage.capitalize()}, {exposures:.0f} exposures, one seed:", markdown(head, tried)]
    return "\n\n".join(parts)


def table_order(row: Result) -> tuple[Any, ...]:
    """Sort key of a result in the tables."""
    return ORDER.index(row["family"]), row["seed"], row["lr"], row["table_lr"]


def repeated(rows: list[Result], again: dict[str, Result]) -> str:
    """Repeated runs beside the first results and the spread over seeds."""
    first, lines = {row["name"]: row for row in rows}, []
    for row in sorted(again.values(), key=table_order):
        seeds = [other for other in rows if other["stage"] == row["stage"] and other["family"] == row["family"]]
        figures = (f"{first[row['name']]['recall']:.1%}", f"{row['recall']:.1%}")
        lines.append((f"`{row['family']}`", str(row["seed"]), *figures, spread(seeds, lambda row: row["recall"])))
    return markdown(("family", "seed", "recall", "again", "of the three seeds"), lines)


def summary(rows: list[Result]) -> str:
    """The figure and table for the project's README."""
    full = grouped(
        sorted((row for row in rows if row["stage"] == "full"), key=table_order), lambda row: (row["family"],)
    )
    if not full:
        return ""
    first = full["dense_x1",][0]
    lines = []
    for (family,), runs in full.items():
        row, parameters = runs[0], runs[0]["parameters"]
        share = row["flops_per_token"] / first["flops_per_token"]
        lines.append(
            (
                NAMES[family],
                f"{share:.2f}",
                f"{parameters['total'] / 1e6:.2f} M",
                spread(runs, lambda row: row["recall"]),
            )
        )
    head = ("model", "arithmetic per token", "parameters", f"recall of {first['facts']:,} facts")
    picture = f"![recall against the arithmetic of the training]({(HERE / 'recall.png').relative_to(ROOT)})"
    return f"{picture}\n\n{markdown(head, lines)}"


def headline(family: str, runs: list[Result]) -> tuple[str, ...]:
    """A family's row: means over seeds, with the lowest and highest in parentheses."""
    row, parameters = runs[0], runs[0]["parameters"]
    zeroed = spread(runs, lambda row: row["recall_zeroed"]) if "recall_zeroed" in row else ""
    return (
        f"`{family}`",
        millions(row["flops_per_token"]),
        millions(parameters["dense"] + parameters["routers"]),
        millions(parameters["table"] + parameters["experts"]),
        f"{row['lr']:g}" + (f", {row['table_lr']:g}" if row["table_lr"] else ""),
        spread(runs, lambda row: row["recall"]),
        zeroed,
        spread(runs, lambda row: row["stored_bits"] / 1e3, ".0f"),
        spread(runs, bits_per_parameter, ".2f"),
    )


def picture(full: dict[tuple[str], list[Result]], path: pathlib.Path) -> None:
    """Draws recall and bits per parameter over the course of training."""
    recall, bits = {}, {}
    for (family,), runs in full.items():
        points = list(zip(*[run["curve"] for run in runs], strict=True))
        total = runs[0]["parameters"]["total"]
        recall[NAMES[family]] = [(each[0]["flops"], [point["recall"] for point in each]) for each in points]
        bits[NAMES[family]] = [
            (each[0]["flops"], [max(0, point["stored_bits"]) / total for point in each]) for each in points
        ]
    panels = [("Recall", "share of the facts", recall), ("Stored bits", "bits per parameter", bits)]
    draw(path, panels, "training FLOPs")


if __name__ == "__main__":
    main()
