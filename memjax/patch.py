"""`python -m memjax.patch`: makes, applies, reverts, merges and shows patches, which replace rows of tables.

`diff RUN RUN --out PATCH`, `apply RUN PATCH`, `revert RUN PATCH`, `merge PATCH PATCH ... --out PATCH`, `show PATCH`.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from memjax.config.help import Positional
from memjax.config.section import LocalPath, Positive, Section
from memjax.io.ctrl_c import run_command
from memjax.runs import subcommands
from memjax.runs.settings import StepSettings
from memjax.runs.subcommands import Subcommand

if TYPE_CHECKING:
    from memjax.runs.patches.patch import Patch

PROG = "python -m memjax.patch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffConfig(StepSettings):
    """The patch to write."""

    out: LocalPath[str]
    """The file to write (.safetensors), or a folder for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApplyConfig(StepSettings):
    """The checkpoint to patch."""

    out: LocalPath[str] | None = None
    """A new folder for a run whose checkpoint has the patch's rows; the run itself is then unchanged. null: the patch
    is recorded in the run's folder, whose checkpoints are unchanged, so that it can be reverted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RevertConfig(StepSettings):
    """The checkpoint whose patch is reverted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig(Section):
    """The patch to write, and how conflicts are resolved."""

    out: LocalPath[str]
    """The file to write (.safetensors), or a folder for it."""
    conflicts: Literal["refuse", "sum", "first", "last"] = "refuse"
    """What to do with rows that several patches change. refuse: name them and write nothing; sum: the old row plus all
    changes; first, last: the row of the first or last patch."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShowConfig(Section):
    """Length of the listing."""

    top: Positive[int] = 10
    """Rows to list per table, those that change most first."""


def diff(old: str, new: str, *, settings: DiffConfig) -> None:
    """Writes the patch that turns the first run's model into the second's."""
    from memjax.runs.patches import edit
    from memjax.runs.patches.patch import write_patch

    patch = edit.diff(old, new, step=settings.checkpoint)
    print(f"written to {write_patch(settings.out, patch)}: {in_words(patch)}")


def apply(run: str, path: str, *, settings: ApplyConfig) -> None:
    """Applies a patch and says how to revert it."""
    from memjax.runs.patches import edit

    patch = edit.apply(run, path, step=settings.checkpoint, out=settings.out)
    if settings.out is not None:
        print(f"written to {settings.out}: the model of {run} with {in_words(patch)}")
        return
    print(f"applied to {run}: {in_words(patch)}")
    print(f"revert it  {PROG} revert {shlex.quote(run)} {patch.identity}")


def revert(run: str, path: str, *, settings: RevertConfig) -> None:
    """Reverts a patch."""
    from memjax.runs.patches import edit

    patch = edit.revert(run, path, step=settings.checkpoint)
    print(f"reverted in {run}: {in_words(patch)}")


def merge(*paths: str, settings: MergeConfig) -> None:
    """Combines several patches into one."""
    from memjax.runs.patches import merge
    from memjax.runs.patches.patch import read_patch, write_patch

    merged = merge.merge([(path, read_patch(path)) for path in paths], conflicts=settings.conflicts)
    print(f"written to {write_patch(settings.out, merged)}: {in_words(merged)}")


def show(*paths: str, settings: ShowConfig) -> None:
    """Prints the content of patches."""
    from memjax.runs.patches.patch import read_patch

    for path in paths:
        print("\n".join(_described(path, read_patch(path), settings.top)))


def in_words(patch: "Patch") -> str:
    """One line that summarises a patch."""
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
        lines.append(f"{name:<{width}}{_note(name, value)}")
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


def _note(name: str, value: str | int | float) -> str:
    """The value of a note; the measurements of `learn` are shares of known answers, except bits per byte."""
    if not isinstance(value, float):
        return str(value)
    is_share = name.endswith((" before", " after")) and not name.startswith("bits per byte")
    return f"{value:.1%}" if is_share else f"{value:,.4g}"


_STEP_OR_PATCH = "A run's folder, then a patch: its file or folder"
COMMANDS: Mapping[str, Subcommand] = {
    "diff": Subcommand(
        diff,
        DiffConfig,
        Positional(name="RUN", help="Two runs' folders: the old model's, then the new one's.", repeats=True),
        "Makes a patch from the differences between the models of two runs, whose dense parameters must be the same.",
        ("diff runs/base runs/tuned --out tuned.safetensors",),
        fewest=2,
        most=2,
    ),
    "apply": Subcommand(
        apply,
        ApplyConfig,
        Positional(name="RUN PATCH", help=f"{_STEP_OR_PATCH}.", repeats=True),
        "Applies a patch to a checkpoint of a run: loading it then gives the changed rows. The checkpoint's files are "
        "unchanged, and training resumes from it without the patch.",
        ("apply runs/quickstart people",),
        fewest=2,
        most=2,
    ),
    "revert": Subcommand(
        revert,
        RevertConfig,
        Positional(name="RUN PATCH", help=f"{_STEP_OR_PATCH}, or the 16 digits that apply printed.", repeats=True),
        "Reverts an applied patch: the model is what it was before, bit for bit.",
        ("revert runs/quickstart people",),
        fewest=2,
        most=2,
    ),
    "merge": Subcommand(
        merge,
        MergeConfig,
        Positional(name="PATCH", help="Patches for the same model.", repeats=True),
        "Combines several patches into one. Rows that only one of them changes are copied.",
        ("merge people places --out both.safetensors",),
        most=None,
    ),
    "show": Subcommand(
        show,
        ShowConfig,
        Positional(name="PATCH", help="Patches.", repeats=True),
        "Prints the content of patches: which model they are for, and the rows that change most.",
        ("show people",),
        most=None,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the first word names; returns the exit code."""
    return subcommands.main(PROG, COMMANDS, argv)


if __name__ == "__main__":
    run_command(main)
