"""A model with its evaluation settings, for question sets and lm-eval tasks."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.evaluation.recall import zero_tables
from memjax.inference.scoring import Score, ScoreRequest, Show, score
from memjax.inference.text import continue_texts
from memjax.models.decoder import Decoder
from memjax.monitoring.progress import Progress
from memjax.ops.precision import resolve_dtype
from memjax.runs.load import LoadedModel


class Written(NamedTuple):
    """A continuation of a prompt."""

    text: str
    is_cut: bool
    """Whether the prompt was truncated from the left."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalModel:
    """A model with the tokenizer and settings with which it is evaluated."""

    model: Decoder
    tokenizer: Tokenizer
    max_length: int
    """Context length in tokens."""
    batch_size: int = 64
    """Sequences per batch; under a mesh, a multiple of its devices. Results do not depend on it."""
    progress_seconds: float = 10.0
    """Seconds between progress lines."""

    @classmethod
    def of(cls, run: LoadedModel, *, max_length: int | None = None, batch_size: int = 64) -> "EvalModel":
        """The model of a run; max_length=None is the sequence length it was trained with."""
        return cls(
            model=run.model,
            tokenizer=run.tokenizer,
            max_length=max_length or run.config.data.sequence_length,
            batch_size=batch_size,
            progress_seconds=run.config.log.progress_seconds,
        )

    def description(self) -> dict[str, Any]:
        """The evaluation settings that results depend on, as JSON values."""
        return {
            "sequence_length": self.max_length,
            "dtype": resolve_dtype(self.model.config.dtype).name,
            "tokenizer": self.tokenizer.fingerprint,
            "begin_token": True,
        }

    def zeroed(self) -> "EvalModel | None":
        """A copy with zeroed tables, or None without tables. Frees the tables of this model, which is then unusable."""
        if not self.model.config.lookups:
            return None
        return dataclasses.replace(self, model=zero_tables(self.model, donate=True))

    @contextlib.contextmanager
    def progress(self, text: str) -> Iterator[Show]:
        """Shows progress while the block runs; yields a function that takes the share done."""
        with Progress(1, self.progress_seconds) as progress:
            yield lambda share: progress.update(share, text)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """The log-likelihood of each continuation."""
        with self.progress(f"{len(requests):,} log-likelihoods") as show:
            return score(self.model, requests, max_length=self.max_length, batch_size=self.batch_size, show=show)

    def write(
        self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str], sampling: SamplingConfig, show: Show
    ) -> list[Written]:
        """Continues each prompt until a stop string.

        Prompts that leave no room for max_tokens are truncated from the left, but never to less than half of
        max_length.
        """
        room = max(self.max_length - max_tokens, self.max_length // 2, 1)
        lengths = [1 + len(ids) for ids in self.tokenizer.encode_batch(prompts)]
        # So that prompts of a batch have similar lengths; the longest, which take the most memory, come first.
        order = sorted(range(len(prompts)), key=lambda number: -lengths[number])
        texts = continue_texts(
            self.model,
            self.tokenizer,
            [prompts[number] for number in order],
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            batch_size=self.batch_size,
            max_prompt_tokens=room,
        )
        found = {}
        for number, continuation in zip(order, texts, strict=True):
            found[number] = Written(continuation.text, lengths[number] > room)
            show(len(found) / len(prompts))
        return [found[number] for number in range(len(prompts))]
