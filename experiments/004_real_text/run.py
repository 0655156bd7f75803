"""Does memory pay on real text? See README.md.

python experiments/004_real_text/run.py --prepare DATA FOLDER                     # once, on any machine
python experiments/004_real_text/run.py --data FOLDER --gpus 4 --seconds 540      # repeat until all is done
python experiments/004_real_text/run.py --size small                              # CPU, minutes: shows that it runs
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

from factlab import command
from factlab.report import write_into
from factlab.runs import FamilyTraining, Result, read_results
from realtext.tables import report, summary

SUMMARY = "<!-- made by experiments/004_real_text/run.py --report -->"
STAGES = ("grid", "full", "134m", "others", "seeds", "large", "134m_others", "ablations", "long", "134m_seeds")
TOKENS = 43e6
"""Tokens of the training text, for time estimates and the steps of large models."""

MIDDLE = (2e-3, 1e-1)
GRID = {
    "dense_x1": [(1e-3, 0.0), (2e-3, 0.0), (4e-3, 0.0)],
    "memory_plus": [(2e-3, 2e-2), (2e-3, 1e-1), (2e-3, 3e-1), (1e-3, 1e-1), (4e-3, 1e-1)],
}
"""Peak learning rates of the dense parameters and of the tables. The dense rate is that of the best dense model, the
table rate that of the best Memory+ at the middle dense rate."""
TABLE_FACTORS = {"memory": 3.0, "peer": 0.2}
"""Rates of other tables relative to that of Memory+, as in the presets."""
WIDTH = 384
"""Width of the grid's models; for wider models, rates are multiplied by WIDTH / dim."""

AS_TEXT = (
    *("--data.source", "biographies", "--data.packing", "none", "--data.sequence_length", "512"),
    *("--data.batch_size", "64", "--optim.lr", "1.0", "--optim.schedule", "constant", "--optim.warmup_steps", "0"),
    *("--optim.table.lr", "1.0", "--optim.table.schedule", "constant", "--optim.table.warmup_steps", "0"),
    *("--train.remat", "none"),
)
"""Settings with which presets are trained like the families."""
DENSE_X8 = ("--model.dim", "1024", "--model.num_layers", "16", "--model.num_heads", "16", "--model.ffn_dim", "2816")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model."""

    config: str
    has_table: bool = False
    dim: int = WIDTH
    settings: tuple[str, ...] = ()
    """Settings in addition to the YAML."""
    speed: float = 1e6
    """Estimated tokens per second, alone on an H200."""


def _own(name: str, speed: float, **options: Any) -> Family:
    return Family(config=f"experiments/004_real_text/families/{name}.yaml", speed=speed, **options)


def _preset(name: str, speed: float, dim: int, *settings: str, **options: Any) -> Family:
    return Family(config=f"configs/{name}.yaml", speed=speed, dim=dim, settings=(*AS_TEXT, *settings), **options)


FAMILIES = {
    "dense_x1": _own("dense_x1", 1.4e6),
    "memory_plus": _own("memory_plus", 0.95e6, has_table=True),
    "dense_x2": _own("dense_x2", 0.8e6, dim=576),
    "memory_plus_large": _own("memory_plus_large", 0.75e6, has_table=True),
    "peer": _own("peer", 0.6e6, has_table=True),
    "moe": _own("moe", 0.8e6),
    "memory_plus_small": _own("memory_plus_small", 0.95e6, has_table=True),
    "memory": _own("memory", 1.2e6, has_table=True),
    "134m_dense": _preset("134m_dense", 0.48e6, 768),
    "134m_memory_plus": _preset("134m_memory_plus_1m", 0.42e6, 768, has_table=True),
    "134m_moe": _preset("134m_moe", 0.33e6, 768),
    "134m_dense_x2": _preset("134m_dense", 0.28e6, 1024, *DENSE_X8),
}
OF_STAGE = {
    "full": ["dense_x1", "memory_plus", "dense_x2"],
    "134m": ["134m_dense", "134m_memory_plus"],
    "others": ["memory_plus_large", "peer", "moe", "memory_plus_small", "memory"],
    "134m_others": ["134m_moe", "134m_dense_x2"],
    "long": ["memory_plus", "dense_x2", "dense_x1"],
}
AGAIN = {"seeds": (("dense_x1", "memory_plus", "dense_x2"), 3), "134m_seeds": (("134m_dense", "134m_memory_plus"), 2)}
"""Stages with further seeds: families, and their number of seeds."""

ABLATIONS = (
    (),
    ("--model.memory.gate", "none"),
    ("--model.memory.layers", "3"),
    ("--model.memory.layers", "2,4"),
    ("--model.memory.layers", "0,1,2"),
    ("--model.memory.layers", "3,4,5"),
    ("--model.memory.shared_table", "false", "--model.memory.num_keys", "591"),
    ("--model.memory.qk_norm", "false", "--model.memory.score_scale", "1.0"),
    ("--model.memory.value_init_scale", "1.0"),
    ("--model.memory.key_dim", "96"),
    ("--model.memory.key_dim", "384"),
    ("--model.memory.value_dim", "192", "--model.memory.num_keys", "1448"),
    ("--model.memory.value_dim", "768", "--model.memory.num_keys", "724"),
    ("--optim.table.optimizer", "adam"),
    ("--optim.table.stochastic_rounding", "false"),
    ("--optim.key_lr_factor", "1.0"),
)
"""Changes to memory_plus, the most interesting first; numbers of slots keep the size of the tables in bytes."""
LARGE = {
    "1.3b_memory_plus": _preset("1.3b_memory_plus_1m", 25e3, 2048, has_table=True),
    "720m_memory_plus": _preset("720m_memory_plus_1m", 45e3, 1536, has_table=True),
}
AS_LARGE = ("--data.sequence_length", "4096", "--data.batch_size", "4", "--train.remat", "block")
LARGE_STEPS, LARGE_RATES = 50, (2e-4, 2e-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRun(FamilyTraining):
    """A training run on text; exposures are epochs."""

    data: str
    """The prepared folder."""
    work: str
    """The folder of its tokens."""
    changed: tuple[str, ...] = ()
    """The settings that differ from the family's."""
    points: int = 10
    """How often the model is measured."""
    measures: str = "all"
    """all, curve or loss; see `TextTrainer.run`."""

    @property
    def changes(self) -> tuple[str, ...]:
        """The settings without those of the family."""
        return self.changed

    @property
    def name(self) -> str:
        """A name from stage, family, rates and changes."""
        return self.named()

    @property
    def kind(self) -> tuple[Any, ...]:
        """Everything that a compiled program depends on."""
        return self.config, self.settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters that determine the cost."""

    epochs: float
    grid_epochs: float
    long_epochs: float
    ablation_epochs: float
    seeds: int
    tokens: float = TOKENS
    families: tuple[str, ...] | None = None
    """Families to run; None: all."""
    settings: tuple[str, ...] = ()
    memory_settings: tuple[str, ...] = ()
    points: int = 10
    large_points: int = 4


SIZES = {
    "full": Size(epochs=2, grid_epochs=0.25, long_epochs=4, ablation_epochs=1, seeds=3),
    # Only shows that everything runs: a minute or two on a CPU.
    "small": Size(
        epochs=2,
        grid_epochs=1,
        long_epochs=3,
        ablation_epochs=1,
        seeds=1,
        tokens=1e3,
        families=("dense_x1", "memory_plus"),
        settings=(
            *("--model.dim", "32", "--model.num_layers", "2", "--model.num_heads", "2", "--model.ffn_dim", "48"),
            *("--data.sequence_length", "64", "--data.batch_size", "8"),
        ),
        memory_settings=(
            *("--model.memory.layers", "1", "--model.memory.num_keys", "16", "--model.memory.num_heads", "2"),
            *("--model.memory.top_k", "4", "--model.memory.key_dim", "16"),
        ),
        points=2,
    ),
}


def main() -> None:
    began = time.time()
    options = command.parser(__doc__, stages=STAGES, sizes=tuple(SIZES), folder=HERE)
    options.add_argument(
        "--prepare", type=pathlib.Path, nargs=2, metavar=("DATA", "FOLDER"), help="folder of data sets, and target"
    )
    options.add_argument(
        "--data", type=pathlib.Path, default=ROOT / "runs/real_text", help="the folder that --prepare writes"
    )
    options.add_argument("--work", type=pathlib.Path, help="folder for tokens; default: a temporary folder")
    options.set_defaults(jobs=None)
    arguments = options.parse_args()
    arguments.jobs = arguments.jobs or arguments.gpus
    size, data, work = SIZES[arguments.size], arguments.data, arguments.work
    if arguments.prepare:
        from realtext.prepare import prepare

        prepare(*arguments.prepare)
        return
    if arguments.size == "small":
        data = pathlib.Path(tempfile.gettempdir()) / "realtext_generated"
    work = work or pathlib.Path(tempfile.gettempdir()) / f"realtext_{data.resolve().name}"
    if not (arguments.plan or arguments.report):
        tokenise(data, work, generated=arguments.size == "small")
        print(f"tokens are there after {time.time() - began:.0f} s", flush=True)
    command.serve(
        arguments,
        HERE,
        lambda stage, results: runs_of(stage, size, results, str(data), str(work)),
        report,
        deadline=None if arguments.seconds is None else began + arguments.seconds,
        awaited=("grid",),
        module="realtext.worker",
        paths=(HERE,),
        describe=describe,
        keeps_order=True,
    )
    if arguments.report:
        rows = list(read_results(HERE / "results" / "full.json").values())
        write_into(ROOT / "README.md", summary(rows), begin=SUMMARY)


def tokenise(data: pathlib.Path, work: pathlib.Path, *, generated: bool) -> None:
    """Tokenises the data, unless that has been done."""
    # Imported late, so that --help and --plan are fast.
    from realtext import corpus
    from realtext import generated as people

    from memjax.errors import DataError

    try:
        if generated:
            people.generate(data)
        corpus.build(data, work)
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from None


def describe(row: Result) -> str:
    """Summary of a finished run's result, for its progress line."""
    last = row["curve"][-1]
    shown = "not finite" if last["loss"] is None else f"loss {last['loss']:.3f}"
    if "bits_per_byte" in last:
        answers = ", ".join(f"{name} {nats:.2f}" for name, nats in list(last["answers"].items())[:3])
        shown += f", held out {last['bits_per_byte']['held_out']:.4f} bits/byte, nats of answers {answers}"
    return f"{shown}, {row['evaluation_seconds']:.0f} s of evaluation"


def runs_of(stage: str, size: Size, results: dict[str, Result], data: str, work: str) -> list[TextRun]:
    """The runs of a stage; all except the grid use its best rates."""

    def one(
        family: str,
        rates: tuple[float, float],
        epochs: float,
        *,
        seed=0,
        changes=(),
        points=size.points,
        measures="all",
    ) -> TextRun:
        of = FAMILIES[family]
        small = (*size.settings, *(size.memory_settings if of.has_table else ()))
        return TextRun(
            stage=stage,
            family=family,
            config=of.config,
            lr=rates[0],
            table_lr=rates[1],
            exposures=epochs,
            data=data,
            work=work,
            seed=seed,
            settings=(*of.settings, *small, *changes),
            changed=tuple(changes),
            points=points,
            measures=measures,
            alone=stage.startswith("134m"),
            seconds=seconds_of(family, of, epochs * size.tokens, points, results),
        )

    if stage == "grid":
        tried = ((family, rates) for family, of_family in GRID.items() for rates in of_family)
        runs = [one(family, rates, size.grid_epochs, points=1, measures="curve") for family, rates in tried]
        return runs if size.families is None else runs[2:4]
    if stage == "large":
        return [] if size.families else [large(family, data, work) for family in LARGE]
    points = size.large_points if stage.startswith("134m") else size.points
    if stage in AGAIN:
        families, num_seeds = AGAIN[stage]
        pairs = [(family, seed) for seed in range(1, min(num_seeds, size.seeds)) for family in families]
        runs = [one(name, rates_of(name, results), size.epochs, seed=seed, points=points) for name, seed in pairs]
    elif stage == "ablations":
        rates = rates_of("memory_plus", results)
        cheap = {"points": 2, "measures": "curve"}
        runs = [one("memory_plus", rates, size.ablation_epochs, changes=change, **cheap) for change in ABLATIONS]
        runs = runs if size.families is None else runs[:1]
    else:
        epochs = size.long_epochs if stage == "long" else size.epochs
        runs = [one(name, rates_of(name, results), epochs, points=points) for name in OF_STAGE[stage]]
    return [run for run in runs if size.families is None or run.family in size.families]


def large(family: str, data: str, work: str) -> TextRun:
    """A few steps of a large model, to check that it trains and how fast."""
    of = LARGE[family]
    return TextRun(
        stage="large",
        family=family,
        config=of.config,
        lr=LARGE_RATES[0],
        table_lr=LARGE_RATES[1] if of.has_table else 0.0,
        exposures=LARGE_STEPS * 4 * 4096 / TOKENS,
        data=data,
        work=work,
        settings=(*of.settings, *AS_LARGE),
        points=5,
        measures="loss",
        alone=True,
        seconds=90 + LARGE_STEPS * 4 * 4096 / of.speed,
    )


def seconds_of(family: str, of: Family, tokens: float, points: int, results: dict[str, Result]) -> float:
    """Estimated time, from the fastest run of the family so far: others may have shared their GPU."""
    known = [row["tokens_per_second"] for row in results.values() if row["family"] == family]
    speed = max(known, default=0) or of.speed
    slower = FAMILIES["dense_x1"].speed / of.speed
    return 50 + tokens / speed + (points + 3) * 2 * slower


def rates_of(family: str, results: dict[str, Result]) -> tuple[float, float]:
    """The grid's best rates, scaled for a family; the middle ones if the grid has not been run."""
    lr = best_of_grid("dense_x1", results, MIDDLE[0])["lr"]
    table_lr = best_of_grid("memory_plus", results, MIDDLE[0])["table_lr"]
    of = FAMILIES[family]
    scale = WIDTH / of.dim
    table_lr *= TABLE_FACTORS.get(family, 1.0)
    return round(lr * scale, 7), round(table_lr * scale, 7) if of.has_table else 0.0


def best_of_grid(family: str, results: dict[str, Result], middle: float) -> dict[str, float]:
    """The grid's best run of a family; for Memory+, only runs at the middle dense rate count."""
    tried: Iterable[Result] = (row for row in results.values() if (row["stage"], row["family"]) == ("grid", family))
    comparable = [row for row in tried if row["healthy"] and (family == "dense_x1" or row["lr"] == middle)]
    if not comparable:
        return dict(zip(("lr", "table_lr"), MIDDLE, strict=True))
    return min(comparable, key=lambda row: row["curve"][-1]["bits_per_byte"]["held_out"])


if __name__ == "__main__":
    main()
