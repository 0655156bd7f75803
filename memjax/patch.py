"""`python -m memjax.patch`: patches of tables: what differs between runs, applied, taken back, merged and shown.

`diff RUN RUN --out PATCH`, `apply RUN PATCH`, `revert RUN PATCH`, `merge PATCH PATCH ... --out PATCH`, `show PATCH`.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from memjax.config.checks import local_paths, positive, refuse
from memjax.config.help import Positional, help_text
from memjax.config.load import COMPLETE, parse
from memjax.errors import ConfigError
from memjax.io.ctrl_c import run_command
from memjax.runs.command import CheckpointSettings, exit_code

if TYPE_CHECKING:
    from memjax.runs.patch import Patch

PROG = "python -m memjax.patch"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiffConfig:
    """Where the patch goes."""

    out: str
    """The file to write (.safetensors), or a folder for it."""
    step: str = "latest"
    """The checkpoint of both runs: latest, best (lowest validation loss) or its number."""

    def __post_init__(self) -> None:
        CheckpointSettings(step=self.step)
        refuse(local_paths(self, "out"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ApplyConfig:
    """Where the patch is applied."""

    out: str | None = None
    """A new folder for a run whose checkpoint has the patch's rows; the run itself then stays as it is. null notes the
    patch in the run's folder, whose checkpoints stay as they are, so that it can be taken back."""
    step: str = "latest"
    """The checkpoint: latest, best (lowest validation loss) or its number."""

    def __post_init__(self) -> None:
        CheckpointSettings(step=self.step)
        refuse(local_paths(self, "out"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RevertConfig:
    """Where the patch is taken back."""

    step: str = "latest"
    """The checkpoint: latest, best (lowest validation loss) or its number."""

    def __post_init__(self) -> None:
        CheckpointSettings(step=self.step)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Where the patch goes, and what becomes of rows that several patches change."""

    out: str
    """The file to write (.safetensors), or a folder for it."""
    conflicts: Literal["refuse", "sum", "first", "last"] = "refuse"
    """refuse: such rows are named, and nothing is written; sum: the old row plus every change; first, last: the row of
    the first or the last patch."""

    def __post_init__(self) -> None:
        refuse(local_paths(self, "out"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShowConfig:
    """How much is shown."""

    top: int = 10
    """Rows of each table that are listed, those that change most first."""

    def __post_init__(self) -> None:
        refuse(positive(top=self.top))


def diff(paths: Sequence[str], settings: DiffConfig) -> None:
    """Writes the patch that makes the first run's model the second's."""
    from memjax.runs import patching
    from memjax.runs.patch import write_patch

    step = CheckpointSettings(step=settings.step).checkpoint
    patch = patching.diff(paths[0], paths[1], step=step)
    print(f"written to {write_patch(settings.out, patch)}: {in_words(patch)}")


def apply(paths: Sequence[str], settings: ApplyConfig) -> None:
    """Applies a patch and says how to take it back."""
    from memjax.runs import patching

    run, path = paths
    patch = patching.apply(run, path, step=CheckpointSettings(step=settings.step).checkpoint, out=settings.out)
    if settings.out is not None:
        print(f"written to {settings.out}: the model of {run} with {in_words(patch)}")
        return
    print(f"applied to {run}: {in_words(patch)}")
    print(f"take it back  {PROG} revert {shlex.quote(run)} {patch.identity}")


def revert(paths: Sequence[str], settings: RevertConfig) -> None:
    """Takes a patch back."""
    from memjax.runs import patching

    patch = patching.revert(*paths, step=CheckpointSettings(step=settings.step).checkpoint)
    print(f"taken back from {paths[0]}: {in_words(patch)}")


def merge(paths: Sequence[str], settings: MergeConfig) -> None:
    """Writes one patch that does what several do."""
    from memjax.runs import patch as patches

    read = [(path, patches.read_patch(path)) for path in paths]
    merged = patches.merge(read, conflicts=settings.conflicts)
    print(f"written to {patches.write_patch(settings.out, merged)}: {in_words(merged)}")


def show(paths: Sequence[str], settings: ShowConfig) -> None:
    """Prints what is in a patch."""
    from memjax.runs.patch import read_patch

    for path in paths:
        print("\n".join(_described(path, read_patch(path), settings.top)))


def in_words(patch: "Patch") -> str:
    """A patch in a line."""
    tables = ", ".join(
        f"{len(change.rows):,} of {change.num_slots:,} in {name}" for name, change in patch.tables.items()
    )
    return f"patch {patch.identity}, rows {tables}" if tables else f"patch {patch.identity}, no rows"


def _described(path: str, patch: "Patch", top: int) -> list[str]:
    import numpy as np

    lines = [f"{path}: {in_words(patch)}", f"made for the model {patch.base[:16]}"]
    notes = {
        name.replace("_", " "): value for name, value in patch.notes.items() if isinstance(value, str | int | float)
    }
    width = 2 + max(map(len, notes), default=0)
    for name, value in notes.items():
        lines.append(f"{name:<{width}}{f'{value:,.4g}' if isinstance(value, float) else value}")
    for name, change in patch.tables.items():
        old, new = change.old.astype(np.float64), change.new.astype(np.float64)
        moved, size = np.linalg.norm(new - old, axis=1), np.linalg.norm(old, axis=1)
        lines += ["", f"table {name}, rows of {change.new.shape[1]} {change.new.dtype.name}"]
        lines.append(f"  {'row':>12}{'change':>12}{'old length':>12}")
        for number in np.argsort(-moved, kind="stable")[:top].tolist():
            lines.append(f"  {change.rows[number]:>12}{moved[number]:>12.4g}{size[number]:>12.4g}")
        if len(moved) > top:
            lines.append(f"  and {len(moved) - top:,} more")
    return lines


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """What the first word of the command line asks for."""

    run: Callable[[Sequence[str], Any], None]
    """Takes the arguments without a name and the settings."""
    schema: type
    positional: Positional
    fewest: int
    """Arguments without a name."""
    most: int | None
    description: str
    example: str


_STEP_OR_PATCH = "A run's folder, then a patch: its file or folder"
COMMANDS: Mapping[str, Command] = {
    "diff": Command(
        diff,
        DiffConfig,
        Positional(name="RUN", help="Two runs' folders: the old model's, then the new one's.", repeats=True),
        2,
        2,
        "Makes a patch of what differs between the models of two runs, whose dense parameters are the same.",
        "diff runs/base runs/tuned --out tuned.safetensors",
    ),
    "apply": Command(
        apply,
        ApplyConfig,
        Positional(name="RUN PATCH", help=f"{_STEP_OR_PATCH}.", repeats=True),
        2,
        2,
        "Applies a patch to a checkpoint of a run: all that load it then get the changed rows. Its files stay as they "
        "are; a training that goes on from it does so without the patch.",
        "apply runs/quickstart people",
    ),
    "revert": Command(
        revert,
        RevertConfig,
        Positional(name="RUN PATCH", help=f"{_STEP_OR_PATCH}, or its 16 digits that apply has printed.", repeats=True),
        2,
        2,
        "Takes an applied patch back: the model is what it was before, bit for bit.",
        "revert runs/quickstart people",
    ),
    "merge": Command(
        merge,
        MergeConfig,
        Positional(name="PATCH", help="Patches of one model.", repeats=True),
        1,
        None,
        "Makes one patch of several. Rows that only one of them changes are taken over.",
        "merge people places --out both.safetensors",
    ),
    "show": Command(
        show,
        ShowConfig,
        Positional(name="PATCH", help="Patches.", repeats=True),
        1,
        None,
        "Prints what is in patches: which model they are for, and the rows that change most.",
        "show people",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in COMMANDS:
        command = COMMANDS[name]
        parsed = parse(
            command.schema,
            words[1:],
            prog=f"{PROG} {name}",
            description=command.description,
            positional=command.positional,
            examples=[f"{PROG} {command.example}"],
        )
        return exit_code(lambda: _run(name, command, parsed.positionals, parsed.config))
    if name == COMPLETE:
        print("\n".join(COMMANDS))
        return 0
    if name in ("-h", "--help"):
        print(whole_help())
        return 0
    print(f"{PROG}: {name!r} must be one of {', '.join(COMMANDS)}\n--help tells what they do.", file=sys.stderr)
    return 2


def _run(name: str, command: Command, paths: Sequence[str], settings: Any) -> None:
    if len(paths) < command.fewest or (command.most is not None and len(paths) > command.most):
        number = command.fewest if command.fewest == command.most else f"at least {command.fewest}"
        raise ConfigError([f"{name} takes {number} arguments: {command.positional.help} Given: {len(paths)}"])
    _stay_on_cpu()
    command.run(paths, settings)


def whole_help() -> str:
    """The help of every command."""
    parts = [
        help_text(
            command.schema, f"{PROG} {name}", command.description, command.positional, {}, [f"{PROG} {command.example}"]
        )
        for name, command in COMMANDS.items()
    ]
    return "\n\n\n".join([f"usage: {PROG} {'|'.join(COMMANDS)} ...", *parts])


def _stay_on_cpu() -> None:
    """Rows are only copied and compared here; an accelerator, whose memory a training may need, is left alone."""
    import jax

    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    run_command(main)
