"""Facts that the base knows or is to learn, from EntityQuestions and CounterFact, and text from Wikipedia."""

import functools
import itertools
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from factlab import lines
from factlab.entity_questions import STATEMENTS
from factlab.entity_questions import Fact as Question
from factlab.entity_questions import read_facts as read_questions

from memjax.data.sources.records import Segment
from memjax.errors import DataError
from memjax.io.files import write_atomic
from memjax.knowledge.facts import Fact

ARTICLES, HELD_OUT = "wiki/wiki_a.jsonl.xz", "wiki/wiki_heldout.jsonl.xz"
OLD, NEW = "entity_questions/train.jsonl.xz", "entity_questions/dev.jsonl.xz"
EDITS = "counterfact/counterfact_edit.jsonl.xz"
TRAINED = 3
"""Number of statements used to teach a new fact; the fourth and the question are only for testing."""


class Asked(NamedTuple):
    """A prompt and the answer to score."""

    prompt: str
    answer: str
    """Begins with a space."""


class NewFact(NamedTuple):
    """A fact, with wordings for teaching and others for testing."""

    learned: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str
    instead: str = ""
    """CounterFact: what was true before."""
    neighbour: str = ""
    """CounterFact: a prompt about another subject, whose answer should remain `instead`."""

    @property
    def fact(self) -> Fact:
        """The fact in the form that memjax learns."""
        return Fact(tuple((Segment(prompt, False), Segment(self.answer, True)) for prompt in self.learned))


class OldFact(NamedTuple):
    """A fact that the base was trained on."""

    told: tuple[str, ...]
    """Its training prompts."""
    question: Asked


def old_facts(data: pathlib.Path, count: int) -> list[OldFact]:
    """Facts of EntityQuestions' training part; the base is trained on the question of every second one."""
    facts = _drawn(_questions(data / OLD), count)
    found = []
    for number, fact in enumerate(facts):
        told = [wording.format(fact.subject) for wording in STATEMENTS[fact.relation]]
        asked = [fact.question] if number % 2 == 0 else []
        found.append(OldFact((*told, *asked), Asked(fact.question, f" {fact.answers[0]}")))
    return found


def new_facts(data: pathlib.Path, count: int) -> list[NewFact]:
    """Facts of EntityQuestions' development part, about subjects that are not in the training part."""
    known = {fact.subject for fact in _questions(data / OLD)}
    fresh = [fact for fact in _questions(data / NEW) if fact.subject not in known]
    found = []
    for fact in _drawn(fresh, count):
        told = [wording.format(fact.subject) for wording in STATEMENTS[fact.relation]]
        found.append(NewFact(tuple(told[:TRAINED]), (fact.question, *told[TRAINED:]), f" {fact.answers[0]}"))
    return found


def edits(data: pathlib.Path, count: int) -> list[NewFact]:
    """False facts from CounterFact: the new answer is taught in one wording and tested in another."""
    rows = [row for row in read(data / EDITS) if row["prompt"] and row["rephrase_prompt"]]
    return [
        NewFact(
            (row["prompt"],),
            (row["rephrase_prompt"],),
            f" {row['target_new']}",
            instead=f" {row['ground_truth']}",
            neighbour=row["locality_prompt"],
        )
        for row in _drawn(rows, count)
    ]


def write_training(
    data: pathlib.Path, out: pathlib.Path, facts: list[OldFact], articles: int
) -> dict[str, pathlib.Path]:
    """Writes the base's training data as JSON lines: articles, and facts in all training wordings."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"articles": out / "articles.jsonl", "facts": out / "facts.jsonl"}
    rows = itertools.islice(read(data / ARTICLES), articles)
    texts = ({"text": f"{row['title']}\n\n{row['text']}"} for row in rows)
    told = [{"prompt": prompt, "answer": fact.question.answer} for fact in facts for prompt in fact.told]
    for path, rows in zip(paths.values(), (texts, told), strict=True):
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


def held_out_text(data: pathlib.Path, characters: int) -> list[str]:
    """The beginnings of held-out articles."""
    return [row["text"][:characters] for row in read(data / HELD_OUT)]


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file.

    Raises:
        DataError: there is no such file.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file; --data names a folder with {ARTICLES}, {OLD} and the others")
    return lines.read(path)


@functools.cache
def _questions(path: pathlib.Path) -> list[Question]:
    return read_questions(path)


def _drawn(items: list[Any], count: int) -> list[Any]:
    if len(items) < count:
        raise DataError(f"{count:,} facts are asked for, and there are {len(items):,}")
    return random.Random(0).sample(items, count)
