"""Facts to learn and questions to ask: JSON lines with a text, or a prompt and its answer, and paraphrases."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.data.sources.parsing import Keys, MalformedError, fields_record
from memjax.data.sources.records import Record
from memjax.data.sources.stream import RecordFiles
from memjax.data.tokenize import Pairs, encoded_block
from memjax.data.tokenizers.base import Tokenizer
from memjax.errors import DataError

_MULTIPLE = 8
"""Sizes are rounded up to multiples of this, so that similar batches share a compiled program."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """A fact to learn, in one or several wordings."""

    wordings: tuple[Record, ...]

    @property
    def question(self) -> Record | None:
        """The first wording if it has a prompt, to test whether the fact is known; otherwise None."""
        return self.wordings[0] if len(self.wordings[0]) > 1 else None

    def fields(self) -> dict[str, Any]:
        """The fact as JSON values, which `of_fields` reads."""
        first, *others = self.wordings
        fields: dict[str, Any] = {"text": first[0].text}
        if self.question is not None:
            prompt, answer = first[0].text, first[1].text
            # Reading inserts a space between prompt and answer if neither has one.
            if not prompt[-1].isspace() and answer[0] == " " and answer[1:2].strip():
                answer = answer[1:]
            fields = {"prompt": prompt, "answer": answer}
        return fields | ({"paraphrases": [other[0].text for other in others]} if others else {})

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> "Fact":
        """The fact in an object with `text`, or `prompt` and `answer`, and optionally a list of `paraphrases`.

        Raises:
            MalformedError: it has other fields.
        """
        return cls(tuple(_wordings(fields)))


def read_facts(path: str, field: str) -> list[Fact]:
    """Reads facts from a file: objects with `text`, or `prompt` and `answer`, and optionally a list of `paraphrases`.

    Paraphrases of a text are texts; those of a prompt are prompts with the same answer.

    Raises:
        DataError: the file cannot be read or holds no facts, or a line is not a fact; the message names the line.
    """
    if re.search(r"\.[ct]sv(\.(gz|xz|zst|bz2))?$", path, re.IGNORECASE):
        raise DataError(
            f"{path}: {field} must be JSON lines, not a table of values, whose lines would be learned as texts; write "
            'each row as {"prompt": "...", "answer": "..."} on a line of its own'
        )
    facts = []
    for place, fields in RecordFiles(path, field).fields("text"):
        try:
            facts.append(Fact.of_fields(fields))
        except MalformedError as error:
            raise DataError(f"{place}: {error}") from None
    if not facts:
        raise DataError(f"{path}: holds no facts; write one JSON object per line, with text or with prompt and answer")
    return facts


def check_answers(facts: Iterable[Fact]) -> None:
    """Raises a DataError if a prompt has two answers, of which a model can know at most one."""
    answers: dict[str, str] = {}
    records = itertools.chain.from_iterable(fact.wordings for fact in facts if fact.question is not None)
    for prompt, answer in ((record[0].text, record[-1].text) for record in records):
        if answers.setdefault(prompt, answer) != answer:
            raise DataError(
                f"the prompt {prompt!r} has two answers, {answers[prompt].strip()!r} and {answer.strip()!r}, and a "
                "model can know only one; remove the other"
            )


def _wordings(fields: Mapping[str, Any]) -> Iterator[Record]:
    yield fields_record(fields, Keys())
    paraphrases = fields.get("paraphrases")
    if paraphrases is None:
        return
    if not isinstance(paraphrases, list):
        raise MalformedError(f"paraphrases must be a list of texts, not {type(paraphrases).__name__}")
    for number, paraphrase in enumerate(paraphrases):
        name = f"paraphrases[{number}]"
        keys = Keys(text=name) if "text" in fields else Keys(prompt=name)
        yield fields_record({**fields, name: paraphrase}, keys)


def pairs_of(records: Sequence[Record], tokenizer: Tokenizer) -> list[Pairs]:
    """The pairs of token and target of each record, tokenised segment by segment as in training."""
    texts = [segment.text for record in records for segment in record]
    return encoded_block(records, tokenizer.encode_batch(texts), tokenizer).split()


def windows(pairs: Sequence[Pairs], length: int) -> list[Pairs]:
    """Splits pairs into pieces of at most `length`."""
    return [found[start : start + length] for found in pairs for start in range(0, len(found), length)]


def width_of(pairs: Sequence[Pairs]) -> int:
    """Columns of a batch that is wide enough for all of the pairs."""
    return round_up(max(map(len, pairs)))


def round_up(number: int) -> int:
    """Rounds up to a multiple of `_MULTIPLE`."""
    return -(-number // _MULTIPLE) * _MULTIPLE


def batch_of(pairs: Sequence[Pairs], shape: tuple[int, int]) -> dict[str, Array]:
    """A batch: `tokens`, `targets`, `loss_mask` and `segments` (0 for padding, else the row's index plus 1)."""
    filled = np.zeros((*shape, 3), np.int32)
    segments = np.zeros(shape, np.int32)
    for row, found in enumerate(pairs):
        filled[row, : len(found)] = found
        segments[row, : len(found)] = row + 1
    arrays = {
        "tokens": filled[..., 0],
        "targets": filled[..., 1],
        "loss_mask": (filled[..., 2] & 1).astype(np.float32),
        "segments": segments,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}
