"""Loads configs from YAML files and command lines, and reports all problems together, each with its place.

A schema is a frozen dataclass, see memjax.config.run. Nothing here imports JAX, so a wrong config is refused at once.

Written by hand, since no library handles these schemas: tyro turns nullable sections into subcommands, jsonargparse
fails on dataclasses with slots, pydantic-settings does not split plain dataclasses into options, and none reports all
problems together.
"""

import dataclasses
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from memjax.config import arguments, presets
from memjax.config.files import read_config
from memjax.config.help import Positional, help_text, section_help
from memjax.config.problems import Problems, close, did_you_mean
from memjax.config.schema import field_types, printable, section_of, shortened, show, walk
from memjax.config.validation import validate
from memjax.config.yaml import dump
from memjax.errors import ConfigError, shown
from memjax.io.command import explain
from memjax.io.console import output
from memjax.io.paths import local_path, readable_path

T = TypeVar("T")
_NO_FLAGS: Mapping[str, str] = types.MappingProxyType({})


CONFIG_FILE = Positional(
    name="CONFIG.yaml",
    help=(
        "Settings of the run: a YAML file, the name of a preset (`python -m memjax presets` lists them), or the folder "
        "of a run, which continues with its own. Without it, the defaults."
    ),
    required=False,
    is_config=True,
)
RUN_FOLDER = Positional(name="RUN", help="The folder of a run.")
READ_RUN = Positional(name="RUN", help="The folder of a run, or its address (gs://, s3://, hf://, http).", is_read=True)

COMPLETE = "--complete"
"""The sole argument that makes a command print the words that a shell may complete."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parsed(Generic[T]):
    """A parsed command line."""

    config: T
    """The validated settings."""
    positional: str | None
    """The first positional argument, as given."""
    positionals: tuple[str, ...]
    """All positional arguments."""
    flags: frozenset[str]
    """The bare flags that were given, with underscores."""


def load(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Loads a YAML file (and the file it `extends`) and applies overrides such as `--model.dim 64`.

    The path may also be the name of a preset or the folder of a run.

    Raises:
        ConfigError: lists all problems, not only the first.
    """
    problems = Problems(schema)
    tree = read_config(path, problems) if path else {}
    settings, stray, _ = arguments.split(overrides, _NO_FLAGS, problems)
    for word in stray:
        problems.of_arguments(f"{shortened(repr(word))} is not a setting; write --section.key value")
    return validate(tree, settings, problems)


def parse(
    schema: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    positional: Positional | None = CONFIG_FILE,
    flags: Mapping[str, str] = _NO_FLAGS,
    examples: Sequence[str] = (),
) -> Parsed[T]:
    """Parses a command line; exits on --help (with 0) and on problems (with 2)."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == [COMPLETE]:
        output("\n".join(_completions(schema, positional, flags)))
        sys.exit(0)
    if asked := {"-h", "--help"}.intersection(argv):
        topic = next(iter(argv[min(map(argv.index, asked)) + 1 :]), "-")
        if topic.startswith("-"):
            output(help_text(schema, prog, description, positional, flags, examples))
        else:
            output(_help_of(topic, schema, prog))
        sys.exit(0)
    problems = Problems(schema)
    settings, stray, given = arguments.split(argv, flags, problems)
    allowed = 0 if positional is None else len(stray) if positional.repeats else 1
    words, stray = stray[:allowed], stray[allowed:]
    positionals = _paths(words, positional, problems)
    first = positionals[0] if positionals else None
    try:
        tree = read_config(Path(first), problems) if first and positional and positional.is_config else {}
    except OSError as error:  # a name that is too long, or in an unreadable folder
        _end(prog, [explain(error)])
    for word in stray:
        problems.of_arguments(f"{shortened(repr(word))} is an unexpected argument")
    if positional and positional.required and not words:
        problems.of_arguments(f"{positional.name} is missing: {positional.help}")
    try:
        config = validate(tree, settings, problems)
    except ConfigError as error:
        _end(prog, error.problems)
    return Parsed(config=config, positional=first, positionals=positionals, flags=frozenset(given))


def _help_of(topic: str, schema: type, prog: str) -> str:
    """The help of a section or setting; exits if it does not exist."""
    if text := section_help(schema, topic.replace("-", "_")):
        return text
    names = sorted({".".join(path) for path, _ in walk(schema)})
    sections = [name for name, annotation in field_types(schema).items() if section_of(annotation)]
    hint = did_you_mean(close(topic, names)) or (f"; sections: {', '.join(sections)}" if sections else "")
    _end(prog, [f"--help {printable(topic)}: there is no such section or setting{hint}"])


def _paths(words: Sequence[str], positional: Positional | None, problems: Problems) -> tuple[str, ...]:
    """Positional arguments with `~` expanded; invalid paths are reported and omitted."""
    found = []
    for word in words:
        try:
            check = readable_path if positional and positional.is_read else local_path
            found.append(str(check(word, positional.name if positional else "")))
        except ValueError as error:
            problems.of_arguments(str(error))
    return tuple(found)


def _completions(schema: type, positional: Positional | None, flags: Mapping[str, str]) -> list[str]:
    """Words that a shell may complete."""
    settings = [f"--{'.'.join(path)}" for path, annotation in walk(schema) if section_of(annotation) is None]
    configs = presets.names() if positional and positional.is_config else []
    return [*configs, *settings, *(f"--{name}" for name in flags), "--help"]


def _end(prog: str, problems: Sequence[str]) -> NoReturn:
    count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    lines = [f"{prog}: {count}", *(f"  {problem}" for problem in shown(problems))]
    print("\n".join([*lines, "--help lists every setting."]), file=sys.stderr)
    sys.exit(2)


def to_yaml(config: Any) -> str:
    """The whole config as YAML, from which `load` restores an equal one."""
    return dump(dataclasses.asdict(config))


def differences(old: Any, new: Any, _prefix: str = "") -> list[str]:
    """The fields in which two configs of one schema differ, such as `optim.lr: 0.006 -> 0.001`."""
    lines: list[str] = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            lines += differences(before, after, f"{_prefix}{field.name}.")
        elif before != after:
            lines.append(f"{_prefix}{field.name}: {show(before)} -> {show(after)}")
    return lines
