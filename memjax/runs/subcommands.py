"""Command lines with subcommands: `memjax.convert` and `memjax.patch`."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memjax.config.help import Positional, help_text
from memjax.config.load import COMPLETE, parse
from memjax.config.problems import close, did_you_mean
from memjax.errors import ConfigError
from memjax.io.command import exit_code
from memjax.io.console import fitted


@dataclasses.dataclass(frozen=True, slots=True)
class Subcommand:
    """A subcommand, named by the first word of the command line."""

    run: Callable[..., None]
    """Called with the positional arguments, and `settings` by name."""
    schema: type
    positional: Positional
    description: str
    examples: tuple[str, ...] = ()
    """Command lines for the help, without the program."""
    fewest: int = 1
    """Fewest and most positional arguments; most=None is any number."""
    most: int | None = 1


def main(prog: str, subcommands: Mapping[str, Subcommand], argv: Sequence[str] | None) -> int:
    """Runs the subcommand that the first word names, on the CPU; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0].replace("_", "-") if words else ""
    if name in subcommands:
        parsed = parse(argv=words[1:], **_command_line(prog, name, subcommands[name]))
        return exit_code(lambda: _run(name, subcommands[name], parsed.positionals, parsed.config))
    if name == COMPLETE:
        print("\n".join(subcommands))
        return 0
    if name in ("-h", "--help"):
        parts = [help_text(flags={}, **_command_line(prog, *item)) for item in subcommands.items()]
        print("\n\n\n".join([f"usage: {prog} {'|'.join(subcommands)} ...", *parts]))
        return 0
    guess = did_you_mean(close(name, list(subcommands)))
    problem = f"there is no command {name!r}{guess}" if words else "name what to do"
    width = max(map(len, subcommands)) + 2
    overview = "\n".join(f"  {known:<{width}}{one.description}" for known, one in subcommands.items())
    usage = f"usage: {prog} COMMAND ...\n\n{fitted(overview, width + 2)}\n\nCOMMAND --help explains a command."
    print(f"{prog}: {problem}\n\n{usage}", file=sys.stderr)
    return 2


def _command_line(prog: str, name: str, subcommand: Subcommand) -> dict[str, Any]:
    """The arguments of `parse` and `help_text`."""
    return {
        "schema": subcommand.schema,
        "prog": f"{prog} {name}",
        "description": subcommand.description,
        "positional": subcommand.positional,
        "examples": [f"{prog} {example}" for example in subcommand.examples],
    }


def _run(name: str, subcommand: Subcommand, words: Sequence[str], settings: Any) -> None:
    fewest, most = subcommand.fewest, subcommand.most
    if len(words) < fewest or (most is not None and len(words) > most):
        number = fewest if fewest == most else f"at least {fewest}"
        raise ConfigError(f"{name} takes {number} arguments: {subcommand.positional.help} Given: {len(words)}")
    import jax

    # Arrays are only copied and compared; accelerators are left to training runs that need their memory.
    jax.config.update("jax_platforms", "cpu")
    subcommand.run(*words, settings=settings)
