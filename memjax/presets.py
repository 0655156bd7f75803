"""`python -m memjax.presets`: lists the built-in configs and their sizes."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from memjax.config import presets
from memjax.config.load import load, parse
from memjax.config.run import RunConfig
from memjax.config.section import Section
from memjax.io.command import exit_code
from memjax.io.console import columns, fitted, is_terminal, say
from memjax.io.ctrl_c import run_command

_DEVICES = re.compile(r"[1-9]\d{0,5}x(?=.*[1-9])\d{1,6}(\.\d+)?")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PresetsConfig(Section):
    """Presets to list, and devices to plan for."""

    only: tuple[str, ...] = ()
    """Names of presets; by default, all."""
    fit: tuple[str, ...] = ()
    """Devices such as 1x24 or 8x80, number and GB of each: prints how each preset fits on them."""

    def problems(self) -> Iterator[str]:
        unknown = [name for name in self.only if presets.find(name) is None or name == presets.RECIPE]
        if unknown:
            yield f"only={','.join(unknown)} must be names of presets; memjax presets lists them"
        if any(not _DEVICES.fullmatch(devices) for devices in self.fit):
            yield f"fit={','.join(self.fit)} must be numbers of devices and GB of each, such as 1x24,8x80"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each preset; returns the exit code."""
    settings = parse(
        PresetsConfig,
        argv,
        prog="python -m memjax.presets",
        description="Lists the configs that `memjax train NAME` accepts by name, from any folder.",
        positional=None,
        examples=["memjax presets", "memjax presets --fit 1x24,1x80,8x80"],
    ).config
    names = settings.only or [name for name in presets.names() if name != presets.RECIPE]
    configs = {name: load(RunConfig, presets.find(name)) for name in names}
    configs = dict(sorted(configs.items(), key=lambda item: item[1].model.dim))
    return exit_code(lambda: _fit(configs, settings.fit) if settings.fit else _list(configs))


def _fit(configs: Mapping[str, RunConfig], fit: Sequence[str]) -> None:
    """Prints a Markdown table: the batch, the micro-batches and other changed settings for each kind of device."""
    pairs = [devices.split("x") for devices in fit]
    say(f"| preset | {' | '.join(f'{number} x {size} GB' for number, size in pairs)} |")
    say("|---" * (len(pairs) + 1) + "|")
    for name, config in configs.items():
        cells = [_fitted(config, devices=int(number), device_bytes=int(float(size) * 1e9)) for number, size in pairs]
        say(f"| `{name}` | {' | '.join(cells)} |")


def _fitted(config: RunConfig, *, devices: int, device_bytes: int) -> str:
    from memjax.training.plan.search import search

    found = search(config, devices=devices, device_bytes=device_bytes)
    if found is None:
        return "no"
    settings = f"{found.config.data.batch_size:,} in {found.config.train.grad_accum_steps:,}"
    settings += f", tables over {found.config.mesh.memory}" if found.config.mesh.memory != config.mesh.memory else ""
    return settings + (f", remat {found.config.train.remat}" if found.config.train.remat != config.train.remat else "")


def _list(configs: Mapping[str, RunConfig]) -> None:
    head = ("name", "parameters", "active", "tokens of a run", "what it is")
    longest = max(map(len, configs))
    # Counting takes a while, so each line is printed as soon as it is known.
    for name, total, active, tokens, summary in itertools.chain([head], itertools.starmap(_row, configs.items())):
        line = f"{name:<{longest}}  {total:>10}  {active:>7}  {tokens:>15}"
        say(f"{line}  {summary}" if not is_terminal() or columns() > 120 else f"{line}\n  {fitted(summary)}")
    end = (
        f"\nThe files are in {presets.folder()}; copy one to change it, or write `extends: NAME.yaml` in your own. "
        "`memjax train NAME --dry_run` says what a run needs on each device, and `--device_gb 80` with it prints the "
        "command that fits devices of 80 GB; `memjax presets --fit 1x80` does both for all."
    )
    say(fitted(end, 0))


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
