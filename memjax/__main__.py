"""`python -m memjax COMMAND ...`: runs a command by name; without one, lists them all."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from memjax import __version__
from memjax.config.problems import close, did_you_mean
from memjax.io.console import fitted, output
from memjax.io.ctrl_c import run_command
from memjax.training.interrupt import run_program

COMMANDS = {
    "train": "train a model, or resume a run",
    "sweep": "train a run for each combination of some settings, and compare them",
    "presets": "list the built-in configs, and what each needs",
    "prepare": "tokenise the data of a run ahead of training",
    "evaluate": "measure what a trained model knows: facts, text, questions or tasks",
    "generate": "continue a prompt, a file of prompts, or prompts at the terminal",
    "serve": "serve a model over HTTP, with OpenAI's interface",
    "inspect": "see which slots a model reads for a prompt, and which texts read a slot",
    "learn": "teach a model facts by changing a few rows of its tables",
    "patch": "make, apply, revert, merge and show patches of changed rows",
    "convert": "import and export Hugging Face models, import official checkpoints, add memory, quantize",
    "plot": "compare runs in one picture",
    "doctor": "show versions and devices, and check what this machine computes",
}


_SHELLS = """Completion in bash and zsh: eval "$(memjax --completion)\""""

_COMPLETION = """_memjax() {
  local word=${COMP_WORDS[COMP_CWORD]} offers
  if ((COMP_CWORD == 1)); then offers="COMMANDS"
  elif ((COMP_CWORD > 2)) && [[ ${COMP_WORDS[1]} == patch || ${COMP_WORDS[1]} == convert ]]; then
    offers=$(memjax "${COMP_WORDS[1]}" "${COMP_WORDS[2]}" --complete 2>/dev/null)
  else offers=$(memjax "${COMP_WORDS[1]}" --complete 2>/dev/null); fi
  COMPREPLY=($(compgen -W "$offers" -- "$word"))
}
[ -n "$ZSH_VERSION" ] && autoload -U +X compinit bashcompinit && compinit && bashcompinit
complete -o default -F _memjax memjax"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in COMMANDS:
        return importlib.import_module(f"memjax.{name}").main(words[1:])
    if name == "--completion":
        output(_COMPLETION.replace("COMMANDS", " ".join(COMMANDS)))
        return 0
    if name == "--version":
        output(f"memjax {__version__}")
        return 0
    lines = [f"  {command:<10} {summary}" for command, summary in COMMANDS.items()]
    head, end = ["usage: python -m memjax COMMAND ...", ""], ["", "COMMAND --help explains a command.", _SHELLS]
    overview = "\n".join([*head, fitted("\n".join(lines), 13), *end])
    if name in ("-h", "--help"):
        output(overview)
        return 0
    groups = {group: importlib.import_module(f"memjax.{group}").COMMANDS for group in ("convert", "patch")}
    within = [f"{group} {known}" for group, commands in groups.items() for known in commands if known == name]
    guess = did_you_mean(within or close(name, list(COMMANDS)))
    print(f"python -m memjax: there is no command {name!r}{guess}\n\n{overview}", file=sys.stderr)
    return 2


def program() -> NoReturn:
    """The console script `memjax`; ends the process."""
    if sys.argv[1:2] == ["train"]:
        run_program(main)
    run_command(main)


if __name__ == "__main__":
    program()
