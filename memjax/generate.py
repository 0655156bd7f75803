"""`python -m memjax.generate RUN --prompt "..."`: generates text from one prompt, a file of prompts or the terminal."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memjax.config.load import READ_RUN, parse
from memjax.config.sampling import SamplingConfig
from memjax.config.section import LocalPath, NotNegative, Positive
from memjax.errors import ConfigError, DataError
from memjax.io.command import check_output, exit_code
from memjax.io.console import printable
from memjax.io.ctrl_c import Terminated, heard, run_command
from memjax.io.files import naming, written_lines
from memjax.runs.settings import InferenceSettings, loaded

if TYPE_CHECKING:
    from memjax.runs.load import LoadedModel

PROG = "python -m memjax.generate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(InferenceSettings, SamplingConfig):
    """What to generate, and how."""

    prompt: str | None = None
    """The text to continue. A model of biographies answers a question such as "What is the major of ...? Answer:".
    Without this or a file, prompts are requested at the terminal, or read from standard input, one per line."""
    prompts: LocalPath[str] | None = None
    """A file of prompts: one per line, or (.jsonl) one object per line with the field prompt. Prints one JSON object
    for each, with its text, why it ended, and the other fields of its line."""
    output: LocalPath[str] | None = None
    """The file for these objects; null: the terminal."""
    batch_size: Positive[int] = 8
    """Prompts of the file to process at once; the texts do not depend on it."""
    max_tokens: NotNegative[int] = 64
    """Most tokens to generate; the model may end the text earlier."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, such as '["\\n", "Question:"]'; they may be special tokens."""
    special_tokens: bool = False
    """Parse special tokens in prompts, as written by chat templates, instead of reading them as plain text."""

    def problems(self) -> Iterator[str]:
        yield from InferenceSettings.problems(self)
        yield from SamplingConfig.problems(self)
        if self.prompt is not None and self.prompts is not None:
            yield f"prompts={self.prompts} cannot be combined with prompt; give one of the two"
        if self.output is not None and self.prompts is None:
            yield f"output={self.output} is for a file of prompts; set prompts too"


def main(argv: Sequence[str] | None = None) -> int:
    """Continues one or more prompts; returns the exit code."""
    parsed = parse(
        GenerateConfig,
        argv,
        prog=PROG,
        description="Prints how a trained model continues a prompt, token by token.",
        positional=READ_RUN,
        examples=[
            f'{PROG} runs/quickstart --prompt "What is the major of"',
            f"{PROG} runs/quickstart --prompts prompts.txt --output answers.jsonl",
        ],
    )
    return exit_code(lambda: _generate(str(parsed.positional), parsed.config))


def _generate(run: str, settings: GenerateConfig) -> None:
    # An unreadable file is refused before the model is loaded.
    records = None if settings.prompts is None else _read_prompts(settings.prompts)
    if settings.output is not None:
        check_output(settings.output, "output")
    with loaded(run, settings) as found:
        if records is not None:
            _write_file(found, settings, records)
        elif settings.prompt is not None:
            _write(found, settings, settings.prompt, number=0)
        else:
            _converse(found, settings)


def _read_prompts(path: str) -> list[dict[str, Any]]:
    """Reads a file of prompts as objects with the field `prompt`; in a text file, each line is a prompt.

    Raises:
        DataError: the file cannot be read, or a line of JSON is not an object with a text in `prompt`.
    """
    from memjax.data.sources.parsing import Keys
    from memjax.data.sources.stream import RecordFiles

    records = []
    for place, record in RecordFiles(path, "--prompts", Keys("prompt")).fields("prompt"):
        if not isinstance(record.get("prompt"), str):
            raise DataError(f"{place}: not an object with a text in the field 'prompt'")
        records.append(record)
    return records


def _write_file(found: "LoadedModel", settings: GenerateConfig, records: list[dict[str, Any]]) -> None:
    from memjax.inference.text import continue_texts

    texts = continue_texts(
        found.model,
        found.tokenizer,
        [record["prompt"] for record in records],
        max_tokens=settings.max_tokens,
        sampling=settings,
        stop=settings.stop,
        special_tokens=settings.special_tokens,
        batch_size=settings.batch_size,
    )
    with written_lines(settings.output) if settings.output else contextlib.nullcontext(_print_line) as write:
        for record, continuation in zip(records, texts, strict=True):
            write(json.dumps(record | dataclasses.asdict(continuation), ensure_ascii=False))


def _print_line(line: str) -> None:
    with naming("standard output"):
        print(printable(line), flush=True)


def _write(found: "LoadedModel", settings: GenerateConfig, prompt: str, *, number: int) -> None:
    from memjax.inference.text import stream_text
    from memjax.monitoring.compilation import compile_seconds

    pieces = stream_text(
        found.model,
        found.tokenizer,
        prompt,
        max_tokens=settings.max_tokens,
        sampling=settings,
        stop=settings.stop,
        special_tokens=settings.special_tokens,
        number=number,
    )
    with compile_seconds() as compiling:
        began, first, tokens = time.monotonic(), None, 0
        compiling_first = 0.0

        def shown() -> Iterator[str]:
            nonlocal tokens
            tokens = yield from pieces

        for piece in shown():
            if first is None:
                first, compiling_first = time.monotonic(), compiling()
            print(printable(piece), end="", flush=True)
        print(flush=True)
        ended, compiled = time.monotonic(), compiling()
    if first is None or not tokens:
        print("0 tokens" + ": the model ends the text at once" * (settings.max_tokens > 0), file=sys.stderr)
        return
    told = f"{tokens:,} token{'s' * (tokens > 1)}, the first after {first - began:.1f} s"
    if tokens > 1:
        rate = (tokens - 1) / max(ended - first - (compiled - compiling_first), 1e-9)
        told += f", then {rate:,.{0 if rate >= 9.95 else 1}f} tokens/s"
    print(told + f"; compiling took {compiled:.1f} s" * (compiled >= 0.05), file=sys.stderr)


def _converse(found: "LoadedModel", settings: GenerateConfig) -> None:
    """Reads prompts until the input ends and continues each independently; Ctrl-C ends a text.

    Raises:
        ConfigError: the input is not a terminal and holds no prompt.
        DataError: the input is not a terminal and a prompt is not UTF-8.
    """
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` history and line editing
        print("Write a prompt for the model to continue. Ctrl-D ends.", flush=True)
    number = 0
    while True:
        try:
            prompt = input("> " if asks else "")
        except EOFError:
            if asks:
                print()
            elif not number:
                raise ConfigError(
                    ["prompt=null: give --prompt or --prompts, or write prompts to standard input, one per line"]
                ) from None
            return
        if not prompt:
            continue
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            problem = f"the prompt {prompt[:100]!a} is not UTF-8"
            if not asks:
                raise DataError(f"standard input: {problem}; write it in UTF-8")
            print(problem, file=sys.stderr)
            continue
        try:
            _write(found, settings, prompt, number=number)
        except Terminated:
            raise
        except KeyboardInterrupt:
            heard()
            print()
        number += 1


if __name__ == "__main__":
    run_command(main)
