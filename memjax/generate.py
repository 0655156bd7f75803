"""`python -m memjax.generate RUN --prompt "..."`: text from a trained model, printed as it is made."""

import dataclasses
import sys
from collections.abc import Sequence

from memjax import command_line
from memjax.evaluation.command import CheckpointSettings, exit_code, loaded


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(CheckpointSettings):
    """What to write, and how."""

    prompt: str
    """The text to go on from. A model of biographies answers a question such as "What is the major of ...? Answer:"."""
    max_tokens: int = 64
    """The most tokens to write; the model may end the text before."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 draws from the model's own probabilities."""
    seed: int = 0
    """Of the draws; the same seed writes the same text."""

    def __post_init__(self) -> None:
        CheckpointSettings.__post_init__(self)
        problems = [
            f"{name}={value} must not be negative"
            for name, value in (("max_tokens", self.max_tokens), ("temperature", self.temperature))
            if value < 0
        ]
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what follows the prompt; returns the exit code."""
    parsed = command_line.parse(
        GenerateConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m memjax.generate",
        description="Writes what a trained model says after a prompt, token by token.",
        positional=command_line.RUN_FOLDER,
    )
    return exit_code(lambda: _generate(str(parsed.positional), parsed.config))


def _generate(run: str, settings: GenerateConfig) -> None:
    from memjax.data.tokenizer import StreamingDecoder
    from memjax.models.generate import generate

    with loaded(run, settings) as (model, tokenizer):
        decoder = StreamingDecoder(tokenizer)
        tokens = generate(
            model,
            [tokenizer.bos_id, *tokenizer.encode(settings.prompt)],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            stop_ids=(tokenizer.eos_id,),
        )
        for token in tokens:
            print(decoder.push(token), end="", flush=True)
        print(decoder.finish(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
