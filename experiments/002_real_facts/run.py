"""How many real facts do dense and memory models recall, closed-book? See README.md.

python experiments/002_real_facts/run.py --prepare entity_questions/train.jsonl.xz    # once, on any machine
python experiments/002_real_facts/run.py --seconds 570                                # repeat until all is done
"""

import dataclasses
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from factlab import command
from factlab.report import bits_per_parameter, draw, grouped, markdown, millions, spread
from factlab.runs import Result, Run

VOCAB_SIZE = 4096
LR, TABLE_LR = 1e-3, 1e-1
"""Peak learning rates of the dense parameters and of the tables: the best of 001's gate."""
FAMILIES = {
    "dense_x1": 0.0,
    "dense_x4": 0.0,
    "memory_plus": TABLE_LR,
    "memory_plus_small": TABLE_LR,
    "memory_plus_large": TABLE_LR,
}
HEADLINE = ("dense_x1", "dense_x4", "memory_plus")
"""Families trained with three seeds on the largest number of facts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters that determine the cost."""

    counts: tuple[int, ...]
    """Numbers of facts, the largest last."""
    exposures: float
    seeds: int
    settings: tuple[str, ...] = ()


SIZES = {
    "full": Size(counts=(30_000, 120_000), exposures=60, seeds=3),
    # Only shows that everything runs: minutes on a CPU.
    "small": Size(counts=(200,), exposures=30, seeds=1, settings=("--data.batch_size", "64")),
}


def main() -> None:
    options = command.parser(__doc__, stages=("full",), sizes=tuple(SIZES), folder=HERE)
    options.add_argument("--prepare", type=pathlib.Path, metavar="QUESTIONS", help="EntityQuestions' training part")
    options.add_argument(
        "--facts", type=pathlib.Path, default=ROOT / "runs/entity_questions.npz", help="the file that --prepare writes"
    )
    arguments = options.parse_args()
    # Imported late, so that --help is fast.
    from factlab.entity_questions import prepare

    from memjax.errors import DataError

    try:
        if arguments.prepare:
            prepare(arguments.prepare, arguments.facts, vocab_size=VOCAB_SIZE)
            return
        if not arguments.facts.exists() and not (arguments.plan or arguments.report):
            raise DataError(f"{arguments.facts}: there is no such file; make it with --prepare QUESTIONS first")
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from None
    size = SIZES[arguments.size]
    command.serve(arguments, HERE, lambda *_: runs_of(size, arguments.facts), report)


def runs_of(size: Size, file: pathlib.Path) -> list[Run]:
    """Every family on every number of facts; the headline families also with other seeds."""
    plan = [(count, family, 0) for count in size.counts[::-1] for family in FAMILIES]
    plan += [(size.counts[-1], family, seed) for seed in range(1, size.seeds) for family in HEADLINE]
    return [
        Run(
            stage="full",
            family=family,
            config=str((HERE / "families" / f"{family}.yaml").relative_to(ROOT)),
            lr=LR,
            table_lr=FAMILIES[family],
            exposures=size.exposures,
            facts={"file": str(file), "count": count},
            seed=seed,
            settings=size.settings,
            # Start and compilation, then tokens at the speed of one of four processes.
            seconds=50 + size.exposures * count * 20 / 2e6,
        )
        for count, family, seed in plan
    ]


def report(rows: list[Result], folder: pathlib.Path) -> str:
    """Exact match by number of facts and family, and by relation, and the figure."""
    groups = grouped(rows, lambda row: (row["facts"], row["family"]))
    if not groups:
        return ""
    picture(groups, folder / "exact_match.png")
    head = ("facts", "family", "FLOPs per token", "dense", "tables", "exact match, never asked", "recall, asked")
    head += ("recall, never asked", "tables zeroed", "stored kbit", "bits per parameter")
    lines = []
    for (count, family), runs in groups.items():
        row, parameters = runs[0], runs[0]["parameters"]
        lines.append(
            (
                f"{count:,}",
                f"`{family}`",
                millions(row["flops_per_token"]),
                millions(parameters["dense"]),
                millions(parameters["table"]),
                spread(runs, lambda row: row["exact_match"]),
                spread(runs, lambda row: row["recall_asked"]),
                spread(runs, lambda row: row["recall_held_out"]),
                spread(runs, lambda row: row["recall_zeroed"]) if "recall_zeroed" in row else "",
                spread(runs, lambda row: row["stored_bits"] / 1e3, ".0f"),
                spread(runs, bits_per_parameter, ".2f"),
            )
        )
    most = max(count for count, _ in groups)
    by_relation = {family: runs for (count, family), runs in groups.items() if count == most}
    relations = next(iter(by_relation.values()))[0]["exact_match_by_relation"]
    of = lambda relation: lambda row: row["exact_match_by_relation"][relation]
    cells = [(name, *(spread(runs, of(name)) for runs in by_relation.values())) for name in relations]
    guess = next(iter(by_relation.values()))[0]["commonest_answer"]
    return "\n\n".join(
        [
            "![exact match against arithmetic](exact_match.png)",
            markdown(head, lines),
            f"Exact match by relation, {most:,} facts (always giving the commonest answer: {guess:.1%}):",
            markdown(("relation", *(f"`{family}`" for family in by_relation)), cells),
        ]
    )


def picture(groups: dict[tuple[int, str], list[Result]], path: pathlib.Path) -> None:
    """Draws exact match and stored bits by arithmetic."""
    matches, bits = {}, {}
    for (count, family), runs in sorted(groups.items(), key=lambda group: group[1][0]["flops_per_token"]):
        name = f"{family.split('_')[0]}, {count:,} facts"
        flops = runs[0]["flops_per_token"]
        matches.setdefault(name, []).append((flops, [row["exact_match"] for row in runs]))
        bits.setdefault(name, []).append((flops, [row["stored_bits"] / 1e3 for row in runs]))
    panels = [("Exact match, never asked", "share of the questions", matches), ("Stored bits", "kbit", bits)]
    draw(path, panels, "FLOPs per token")


if __name__ == "__main__":
    main()
