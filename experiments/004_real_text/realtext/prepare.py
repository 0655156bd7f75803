"""Builds the experiment's data folder from public data sets: articles, questions, tokenizer.

The questions are drawn once, with fixed seeds, so that every model on every machine is asked the same ones. The facts
that a text states are found by matching words, which is noisy: a name may refer to something else.
"""

import json
import lzma
import pathlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from factlab.entity_questions import Fact, read_facts
from factlab.lines import read

from memjax.io.files import write_atomic

Row = dict[str, Any]

ARTICLES, HELD_OUT, QUESTIONS, TOKENIZER = (
    "wiki_a.jsonl.xz",
    "wiki_heldout.jsonl.xz",
    "questions.jsonl.xz",
    "gpt2.tiktoken",
)
OPEN_SETS = ("nq_open_test", "nq_open_dev", "triviaqa_dev", "triviaqa_test", "webquestions_test", "webquestions_train")
FAMILY_OF = {"nq": "NaturalQuestions", "tr": "TriviaQA", "we": "WebQuestions"}
CHOICE_SETS = ("piqa_test", "openbookqa_test", "arc_easy_test", "arc_challenge_test")
SHOTS = 4
"""Number of solved questions in front of each question."""
LONGEST_ANSWER = 6
"""Maximum number of words of an answer."""
MOST_WORDS = 8
"""Maximum number of words of a name searched for in the text."""
BINS = ("in no article", "in an article, in no paragraph", "1 paragraph", "2 or 3 paragraphs", "4 or more paragraphs")
"""How often subject and object of a fact occur together in the text."""


class Sizes(NamedTuple):
    """Numbers of questions to draw."""

    in_text: int = 2000
    not_in_text: int = 1000
    squad: int = 500
    """About articles in the text, and as many about others."""
    by_exposures: int = 400
    """For each of BINS."""
    choices: int = 500
    """From each set."""


def prepare(data: pathlib.Path, out: pathlib.Path, sizes: Sizes | None = None) -> None:
    """Writes the folder; the same files give the same folder."""
    out.mkdir(parents=True, exist_ok=True)
    rng, sizes = random.Random(0), sizes or Sizes()
    articles = list(read(data / "wiki" / ARTICLES))
    questions = _open_questions(data, rng, sizes)
    questions += _squad(data, rng, sizes, {article["title"] for article in articles})
    facts = read_facts(data / "entity_questions/train.jsonl.xz")
    facts += read_facts(data / "entity_questions/dev.jsonl.xz")
    named = {name for question in questions for name in question["answers"]}
    named |= {name for fact in facts for name in (fact.subject, *fact.answers)}
    count = Phrases(named, facts).count(article["text"] for article in articles)
    for question in questions:
        question["target"] = _target(question["answers"], count)
    questions += _facts(facts, count, rng, sizes)
    rows = [*_shots(questions, rng), *questions, *_choices(data, rng, sizes), *_code(data)]
    write(out / QUESTIONS, rows)
    for source in (data / "wiki" / ARTICLES, data / "wiki" / HELD_OUT, data / "tokenizers" / TOKENIZER):
        write_atomic(out / source.name, source.read_bytes())
    for name, number in Counter(row["set"] + (f", {row['bin']}" if "bin" in row else "") for row in rows).items():
        print(f"{number:,} rows of {name}")


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Writes compressed JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def words(name: str) -> str:
    """Normalises a name for comparison: its words in lower case."""
    return " ".join(re.findall(r"\w+", name.lower()))


class Counted(NamedTuple):
    """Occurrences counted by `Phrases.count`."""

    of: Counter[str]
    """How often each name occurs."""
    articles: Counter[int]
    """For each fact (by index), the number of articles that name its subject and one of its answers."""
    paragraphs: Counter[int]
    """The same for paragraphs."""


class Phrases:
    """Names to find in a text, and facts that connect them."""

    def __init__(self, names: Iterable[str], facts: Sequence[Fact]):
        self._names = {phrase for name in names if 0 < len((phrase := words(name)).split()) <= MOST_WORDS}
        lengths = defaultdict(set)
        for phrase in self._names:
            parts = phrase.split()
            lengths[parts[0]].add(len(parts))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}
        self._by_subject: dict[str, list[tuple[int, frozenset[str]]]] = defaultdict(list)
        for number, fact in enumerate(facts):
            answers = frozenset(map(words, fact.answers))
            self._by_subject[words(fact.subject)].append((number, answers))

    def count(self, texts: Iterable[str]) -> Counted:
        """Counts names, and facts by article and paragraph."""
        counted = Counted(Counter(), Counter(), Counter())
        for text in texts:
            whole: set[str] = set()
            for paragraph in text.split("\n"):
                found = self._found(re.findall(r"\w+", paragraph.lower()))
                counted.of.update(found)
                here = set(found)
                counted.paragraphs.update(self._facts_in(here))
                whole |= here
            counted.articles.update(self._facts_in(whole))
        return counted

    def _found(self, parts: list[str]) -> list[str]:
        names, lengths, found = self._names, self._lengths, []
        for place, first in enumerate(parts):
            for length in lengths.get(first, ()):
                if place + length > len(parts):
                    break
                phrase = first if length == 1 else " ".join(parts[place : place + length])
                if phrase in names:
                    found.append(phrase)
        return found

    def _facts_in(self, found: set[str]) -> list[int]:
        return [
            number
            for phrase in found
            if phrase in self._by_subject
            for number, answers in self._by_subject[phrase]
            if not answers.isdisjoint(found)
        ]


def _open_questions(data: pathlib.Path, rng: random.Random, sizes: Sizes) -> list[Row]:
    """Questions answered by an article of the text, and others, drawn from the same sets in the same proportions."""
    answered = {(row["set"], row["row"]) for row in read(data / "factual_qa/wiki_support.jsonl.xz")}
    both: dict[bool, dict[str, list[Row]]] = {True: defaultdict(list), False: defaultdict(list)}
    for name in OPEN_SETS:
        for number, row in enumerate(read(data / f"factual_qa/{name}.jsonl.xz")):
            if answers := _short(row["answers"]):
                family = FAMILY_OF[name[:2]]
                question = {"set": family, "question": row["question"], "answers": answers}
                both[(name, number) in answered][family].append(question)
    total = sum(map(len, both[True].values()))
    drawn: list[Row] = []
    for in_text, count in ((True, sizes.in_text), (False, sizes.not_in_text)):
        for family, there in both[True].items():
            some = rng.sample(both[in_text][family], min(len(both[in_text][family]), round(count * len(there) / total)))
            drawn += [row | {"in_text": in_text} for row in some]
    return drawn


def _short(answers: Iterable[str]) -> list[str]:
    """The answers that contain words and are short enough to generate."""
    return [answer for answer in answers if 0 < len(words(answer).split()) <= LONGEST_ANSWER]


def _squad(data: pathlib.Path, rng: random.Random, sizes: Sizes, titles: set[str]) -> list[Row]:
    """SQuAD's questions, closed-book: about articles in the text, and about others."""
    found: dict[bool, list[Row]] = {True: [], False: []}
    for part in ("train", "dev"):
        for row in read(data / f"squad11/{part}.jsonl.xz"):
            in_text = row["title"].replace("_", " ") in titles
            for question in row["qas"]:
                if answers := _short(dict.fromkeys(question["answers"])):
                    found[in_text].append(
                        {"set": "SQuAD", "question": question["question"], "answers": answers, "in_text": in_text}
                    )
    return [row for rows in found.values() for row in rng.sample(rows, min(sizes.squad, len(rows)))]


def _target(answers: Sequence[str], count: Counted) -> str:
    """The alias of an answer that the text uses most; among equals, preferably one without special characters."""
    return max(answers, key=lambda name: (count.of[words(name)], re.fullmatch(r"[\w .,'&-]+", name) is not None))


def _facts(facts: list[Fact], count: Counted, rng: random.Random, sizes: Sizes) -> list[Row]:
    """EntityQuestions, the same number for each bin of exposures."""
    found = defaultdict(list)
    for number, fact in enumerate(facts):
        answers = _short(fact.answers)
        # A question that names its own answer tests no knowledge.
        if answers and not any(words(answer) in words(fact.question) for answer in answers):
            together = count.paragraphs[number]
            place = (1 if count.articles[number] else 0) if not together else 2 if together == 1 else 3
            place += together >= 4
            row = {"set": "EntityQuestions", "question": fact.question, "answers": answers}
            row |= {"target": _target(answers, count)}
            found[BINS[place]].append(row | {"relation": fact.relation, "paragraphs": together})
    drawn = [(name, rng.sample(found[name], min(sizes.by_exposures, len(found[name])))) for name in BINS]
    return [row | {"bin": name} for name, rows in drawn for row in rows]


def _shots(questions: list[Row], rng: random.Random) -> list[Row]:
    """Removes a few questions of each set from the list, to serve as solved examples for the others."""
    taken: list[Row] = []
    by_set = defaultdict(list)
    for row in questions:
        # Not answered by the text, so that no question about the text is lost.
        if not row.get("in_text") and row.get("bin", BINS[0]) == BINS[0]:
            by_set[row["set"]].append(row)
    for rows in by_set.values():
        for row in rng.sample(rows, min(SHOTS, len(rows))):
            questions.remove(row)
            taken.append({**row, "shot": True})
    return taken


def _choices(data: pathlib.Path, rng: random.Random, sizes: Sizes) -> Iterator[Row]:
    for name in CHOICE_SETS:
        rows = list(read(data / f"mc_eval/{name}.jsonl.xz"))
        yield from rng.sample(rows, min(sizes.choices, len(rows)))


def _code(data: pathlib.Path) -> Iterator[Row]:
    """Programs with their descriptions, for scoring only: models of these sizes cannot write any."""
    for row in read(data / "code_eval/HumanEval.jsonl.gz"):
        yield {"set": "HumanEval", "code": row["prompt"] + row["canonical_solution"]}
    for row in read(data / "code_eval/mbpp.jsonl"):
        yield {"set": "MBPP", "code": f'"""\n{row["text"]}\n"""\n{row["code"]}\n'.replace("\r\n", "\n")}
