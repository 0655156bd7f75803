"""`python -m memjax.presets`: the configs that memjax brings, with their sizes."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from memjax.config import presets
from memjax.config.load import load, parse
from memjax.config.run import RunConfig
from memjax.io.console import say
from memjax.io.ctrl_c import run_command
from memjax.runs.command import exit_code


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PresetsConfig:
    """There is nothing to set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each preset; returns the exit code."""
    parse(
        PresetsConfig,
        argv,
        prog="python -m memjax.presets",
        description="Lists the configs that `memjax train NAME` takes by name, from any folder.",
        positional=None,
    )
    return exit_code(_list)


def _list() -> None:
    configs = {name: load(RunConfig, presets.find(name)) for name in presets.names() if name != presets.RECIPE}
    rows = [_row(name, config) for name, config in sorted(configs.items(), key=lambda item: item[1].model.dim)]
    table = [("name", "parameters", "active", "tokens of a run", "what it is"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for name, *numbers, summary in table:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        say("  ".join([name.ljust(widths[0]), *cells, summary]))
    say(
        f"\nThe files are in {presets.folder()}; copy one to change it, or write `extends: NAME.yaml` in your own. "
        "`memjax train NAME --dry_run` says what a run needs of each device."
    )


def _row(name: str, config: RunConfig) -> tuple[str, str, str, str, str]:
    from memjax.models.counts import count_parameters
    from memjax.models.parts import DecoderParts
    from memjax.monitoring.units import billions

    counts = count_parameters(DecoderParts.of(config.model))
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    summary = _summary(presets.folder() / f"{name}.yaml")
    return name, billions(counts.total), billions(counts.active), f"{tokens / 1e9:,.3f} b", summary


def _summary(file: Path) -> str:
    """The first sentence of the comment at the top of a preset."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"[.;] |\.$", " ".join(line.lstrip("# ") for line in lines))[0]


if __name__ == "__main__":
    run_command(main)
