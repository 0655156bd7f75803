"""What a model answers to questions with short answers and to questions with choices."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import Tokenizer
from memjax.evaluation.question_sets import metrics as metrics_module
from memjax.evaluation.question_sets.formats import ChoiceQuestion, OpenQuestion
from memjax.evaluation.settings import EvaluateConfig
from memjax.inference.scoring import Show, request, score
from memjax.inference.text import continue_texts
from memjax.models.decoder import Decoder, resolve_dtype
from memjax.runs.load import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Examinee:
    """A model that is asked, and how."""

    model: Decoder
    tokenizer: Tokenizer
    max_length: int
    """Tokens that the model sees at once."""
    batch_size: int
    """Sequences at once; under a mesh a multiple of its devices. It changes no answer."""

    @classmethod
    def of(cls, found: LoadedModel, settings: EvaluateConfig) -> "Examinee":
        """The model of a run."""
        length = settings.sequence_length or found.config.data.sequence_length
        return cls(model=found.model, tokenizer=found.tokenizer, max_length=length, batch_size=settings.batch_size)

    def description(self) -> dict[str, Any]:
        """What numbers depend on besides the questions, as JSON values."""
        return {
            "sequence_length": self.max_length,
            "dtype": resolve_dtype(self.model.config.dtype).name,
            "tokenizer": self.tokenizer.fingerprint,
            "begin_token": True,
        }


class Marked(NamedTuple):
    """What a question was answered, and what that is worth."""

    answers: tuple[str, ...]
    """One, or all samples."""
    metrics: dict[str, float]
    """Each 0 to 1; the same names for all questions of a kind."""
    is_cut: bool
    """Whether the prompt did not fit, so that its begin was left out."""


def ask_open(
    who: Examinee,
    questions: Sequence[OpenQuestion],
    before: Sequence[str],
    *,
    max_tokens: int,
    sampling: SamplingConfig,
    show: Show,
) -> list[Marked]:
    """Answers up to the end of the line, by exact match and F1.

    Args:
        who: the model.
        questions: what to ask.
        before: of each question the text in front of its prompt.
        max_tokens: the most tokens of an answer.
        sampling: how their tokens are picked.
        show: is told how much is done.
    """
    prompts = [text + question.prompt for text, question in zip(before, questions, strict=True)]
    written = write(who, prompts, max_tokens=max_tokens, stop=("\n",), sampling=sampling, show=show)
    found = []
    for question, (text, is_cut) in zip(questions, written, strict=True):
        measures = {"exact_match": metrics_module.exact_match, "f1": metrics_module.f1}
        metrics = {name: metrics_module.best(measure, text, question.answers) for name, measure in measures.items()}
        found.append(Marked((text.strip(),), metrics, is_cut))
    return found


def ask_choices(
    who: Examinee, questions: Sequence[ChoiceQuestion], before: Sequence[str], *, show: Show
) -> list[Marked]:
    """The likeliest choice, as it is and for each character of it; beside them the share that a guess would get.

    The arguments are those of `ask_open`.
    """
    requests = [
        request(who.tokenizer, text + option.context, option.continuation)
        for question, text in zip(questions, before, strict=True)
        for option in question.options
    ]
    scores = iter(score(who.model, requests, max_length=who.max_length, batch_size=who.batch_size, show=show))
    lengths = (len(one.context) + len(one.continuation) - 1 for one in requests)
    found = []
    for question in questions:
        likely = np.array([next(scores).log_likelihood for _ in question.options])
        longest = max(next(lengths) for _ in question.options)
        letters = np.array([len(option.continuation.strip()) for option in question.options])
        metrics = {
            "accuracy": float(np.argmax(likely) == question.answer),
            "normalised_accuracy": float(np.argmax(likely / np.maximum(1, letters)) == question.answer),
            "chance": 1 / len(question.choices),
        }
        found.append(Marked((question.choices[np.argmax(likely)],), metrics, longest > who.max_length))
    return found


class Written(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    is_cut: bool
    """Whether the prompt's begin was left out."""


def write(
    who: Examinee,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    stop: Sequence[str],
    sampling: SamplingConfig,
    show: Show,
) -> list[Written]:
    """What the model writes after each prompt, up to a stop string.

    Of prompts that leave no room for max_tokens the begin is left out, but half of max_length is always the prompt's.
    """
    room = max(who.max_length - max_tokens, who.max_length // 2)
    lengths = [1 + len(ids) for ids in who.tokenizer.encode_batch(prompts)]
    # Prompts of one batch are alike in length then; the longest first, which takes the most memory.
    order = sorted(range(len(prompts)), key=lambda number: -lengths[number])
    texts = continue_texts(
        who.model,
        who.tokenizer,
        [prompts[number] for number in order],
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        batch_size=who.batch_size,
        max_prompt_tokens=room,
    )
    found = {}
    for number, continuation in zip(order, texts, strict=True):
        found[number] = Written(continuation.text, lengths[number] > room)
        show(len(found) / len(prompts))
    return [found[number] for number in range(len(prompts))]
