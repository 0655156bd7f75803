"""Facts in all wordings as arrays of token ids, built once, so that a batch is a single gather on the device."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memjax.config.data import BiographiesConfig
from memjax.data.sources import biographies
from memjax.evaluation.knowledge import CHOICES

PAD, BOS, EOS = 0, 1, 2
Ints = NDArray[np.integer]


class FactRows(NamedTuple):
    """A sentence for each fact and wording; wording 0 is the test wording."""

    tokens: Ints
    """[facts, wordings, length + 1]: BOS, prompt, answer, EOS, padding."""
    answers: Ints
    """[facts, wordings, 2]: start and end of the answer in `tokens`, including EOS."""
    first_wording: Ints
    """[facts]: the first training wording; 1 if the test wording is held out."""
    groups: Ints
    """[facts]: index of the attribute or relation."""
    bits: NDArray[np.floating]
    """[facts]: information of the answer, given only the frequency of each answer."""
    group_names: tuple[str, ...]
    vocab_size: int
    told: Ints
    """[facts]: how often an epoch states each fact; 0 for facts used only in tests."""

    @property
    def length(self) -> int:
        """Number of tokens of a row that the model reads."""
        return self.tokens.shape[2] - 1


def biography_rows(config: BiographiesConfig, told: Sequence[int] = (1,)) -> FactRows:
    """The six facts of every person in the library's five wordings; each word is a token.

    An epoch states the facts of person i `told[i % len(told)]` times.
    """
    people = biographies.people(config)
    names = [person.name.split() for person in people]
    values = {name: [person.value(name).split() for person in people] for name in biographies.attribute_names}
    templates = {
        name: [wording.split() for wording in biographies.STATEMENTS[name]] for name in biographies.attribute_names
    }
    words = {word for name in names for word in name}
    words |= {word for answers in values.values() for answer in answers for word in answer}
    words |= {word for wordings in templates.values() for wording in wordings for word in wording if word != "{name}"}
    number = {word: place for place, word in enumerate(sorted(words), start=EOS + 1)}
    ids = lambda texts: np.array([[number[word] for word in text] for text in texts], np.int32)

    name_ids = ids(names)
    rows: list[list[tuple[Ints, int]]] = []
    for attribute in biographies.attribute_names:
        answer_ids = ids(values[attribute])
        rows.append([_tell(wording, number, name_ids, answer_ids) for wording in templates[attribute]])
    width = max(row.shape[1] for wordings in rows for row, _ in wordings)

    num_people, num_attributes, num_wordings = len(people), len(rows), len(rows[0])
    tokens = np.zeros((num_people, num_attributes, num_wordings, width), np.int32)
    answers = np.zeros((num_people, num_attributes, num_wordings, 2), np.int32)
    for attribute, wordings in enumerate(rows):
        for wording, (row, begin) in enumerate(wordings):
            tokens[:, attribute, wording, : row.shape[1]] = row
            answers[:, attribute, wording] = begin, row.shape[1]
    return FactRows(
        tokens=tokens.reshape(-1, num_wordings, width),
        answers=answers.reshape(-1, num_wordings, 2),
        first_wording=np.zeros(num_people * num_attributes, np.int32),
        groups=np.tile(np.arange(num_attributes, dtype=np.int32), num_people),
        bits=np.tile([math.log2(CHOICES.get(name, 1)) for name in biographies.attribute_names], num_people),
        group_names=biographies.attribute_names,
        vocab_size=EOS + 1 + len(number),
        told=np.repeat(np.resize(np.array(told, np.int32), num_people), num_attributes),
    )


def _tell(wording: Sequence[str], number: dict[str, int], names: Ints, answers: Ints) -> tuple[Ints, int]:
    """The sentences of all people in one wording, and the index of the answer's first token."""
    column = lambda token: np.full((len(names), 1), token, np.int32)
    prompt = [names if word == "{name}" else column(number[word]) for word in wording]
    row = np.concatenate([column(BOS), *prompt, answers, column(EOS)], axis=1)
    return row, row.shape[1] - answers.shape[1] - 1


def draw_order(rows: FactRows, *, batch_size: int, steps: int, seed: int) -> Ints:
    """Row indices (fact * wordings + wording) of each batch, [steps, batch_size].

    All statements are reshuffled in every epoch, and the wording is drawn anew for each exposure.
    """
    rng = np.random.default_rng([seed, 3])
    num_wordings = rows.tokens.shape[1]
    told = np.repeat(np.arange(len(rows.told)), rows.told)
    count = steps * batch_size
    epochs = -(-count // len(told))
    fact = np.concatenate([told[rng.permutation(len(told))] for _ in range(epochs)])[:count]
    first = rows.first_wording[fact]
    wording = first + (rng.random(count) * (num_wordings - first)).astype(np.int64)
    return (fact * num_wordings + wording).astype(np.int32).reshape(steps, batch_size)
