"""Generated people with six facts each, stated in several wordings and asked about in questions.

Such text measures how much a model remembers, because its information content is known to the bit (arXiv:2309.14316,
arXiv:2404.05405). Lists, wordings and people are this library's own.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from memjax.config.data import BiographiesConfig
from memjax.data.sources.records import Record, Records, Segment, checked


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _compounds(starts: str, ends: str) -> tuple[str, ...]:
    """Every start joined to every end. With shared parts, even a small BPE keeps each word as one token."""
    return tuple(start + end for start in _words(starts) for end in _words(ends))


FIRST_NAMES = _compounds("Bel Cor Dar El Fen Hal Jor Mar Ros Tal", "a an dis en ia ik la o ric wyn")
LAST_NAMES = _compounds(
    "Ash Black Brook Clay Cross Dun Elm Fair Green Hart Hazel King Lang Marsh North Oak Stone Thorn West Winter",
    "by croft dale field ford ley man mere well wood",
)
CITIES = _compounds(
    "Alder Bren Cal Dover Glen Kar Lin Mel Sand Var", "burg chester ham haven mouth port stad ton vik ville"
)
UNIVERSITIES = _compounds(
    "Ark Cam Gal Hex Lum Nor Pell Quin Sol Tren", "aria bridge dor ence gate iana moor onia stead rath"
)
MAJORS = _words(
    "Accounting Acoustics Aeronautics Agronomy Algebra Anatomy Archaeology Architecture Astronomy Biology "
    "Botany Cartography Ceramics Chemistry Cinema Dance Design Drama Ecology Economics Education "
    "Electronics Ethics Fashion Finance Forestry Genetics Geography Geology Geometry History Journalism "
    "Law Linguistics Literature Logic Marketing Mathematics Medicine Music Nursing Optics Painting "
    "Pharmacy Philosophy Physics Poetry Robotics Sculpture Statistics",
)
EMPLOYERS = _compounds(
    "Aero Bio Cyber Data Geo Hydro Micro Nano Opti Tele", "base core forge gen lux mart nex soft tech works"
)
WORK_CITIES = {employer: CITIES[(37 * i + 11) % len(CITIES)] for i, employer in enumerate(EMPLOYERS)}
"""Each employer has one city, so that a person's work city follows from the employer."""
MONTHS = _words("January February March April May June July August September October November December")
YEARS = range(1940, 2000)
DAYS = range(1, 29)

STATEMENTS: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "{name} was born on",
        "The birth date of {name} is",
        "{name} came into the world on",
        "The parents of {name} welcomed their child on",
        "{name} celebrates a birthday that goes back to",
    ),
    "birth_city": (
        "{name} was born in the city of",
        "The birth city of {name} is",
        "{name} spent the first days of life in",
        "The place where {name} was born is",
        "{name} took the first steps in",
    ),
    "university": (
        "{name} studied at the university of",
        "The university of {name} is",
        "{name} took all exams at",
        "The degree of {name} comes from",
        "{name} spent the student years at",
    ),
    "major": (
        "{name} studied the subject of",
        "The major of {name} is",
        "{name} chose to major in",
        "The degree of {name} is in",
        "{name} wrote a final thesis in",
    ),
    "employer": (
        "{name} works for",
        "The employer of {name} is",
        "{name} earns a living at the company",
        "The company that pays {name} is",
        "{name} signed a contract with",
    ),
    "work_city": (
        "{name} works in the city of",
        "The work city of {name} is",
        "{name} goes to the office in",
        "The place where {name} works is",
        "{name} has a desk in",
    ),
}
"""Statements of each attribute; the value follows and ends the sentence."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "birth_date": ("What is the birth date of {name}? Answer:", "On which day was {name} born? Answer:"),
    "birth_city": ("What is the birth city of {name}? Answer:", "In which city was {name} born? Answer:"),
    "university": ("What is the university of {name}? Answer:", "At which university did {name} study? Answer:"),
    "major": ("What is the major of {name}? Answer:", "Which subject did {name} study? Answer:"),
    "employer": ("What is the employer of {name}? Answer:", "For which company does {name} work? Answer:"),
    "work_city": ("What is the work city of {name}? Answer:", "In which city does {name} work? Answer:"),
}
"""Questions about each attribute; tests use the first wording."""

attribute_names: tuple[str, ...] = tuple(STATEMENTS)
"""The six attributes, in the order used everywhere."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """A full name and a value for each of `attribute_names`."""

    name: str
    birth_date: str
    birth_city: str
    university: str
    major: str
    employer: str
    work_city: str

    def value(self, attribute: str) -> str:
        """The value of one of `attribute_names`."""
        return getattr(self, attribute)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its expected answer, which begins with a space."""

    prompt: str
    answer: str
    attribute: str
    person: Person


def people(config: BiographiesConfig) -> list[Person]:
    """The people of a config, all with different names.

    They have middle names if there are more people than pairs of a first and a last name.

    Raises:
        ValueError: there are more people than names.
    """
    return list(_people(config.num_people, config.seed))


@functools.lru_cache(maxsize=4)
def _people(num_people: int, seed: int) -> tuple[Person, ...]:
    num_pairs = len(FIRST_NAMES) * len(LAST_NAMES)
    num_names = num_pairs * len(FIRST_NAMES)
    if num_people > num_names:
        raise ValueError(f"num_people={num_people} must be at most {num_names}: there are no more names")
    rng = np.random.default_rng([seed, 1])
    names = rng.permutation(num_pairs if num_people <= num_pairs else num_names)[:num_people]
    # Values are drawn independently, so that the information of a person is the sum of the logarithms.
    days, months, years, cities, universities, majors, employers = (
        rng.integers(len(choices), size=num_people)
        for choices in (DAYS, MONTHS, YEARS, CITIES, UNIVERSITIES, MAJORS, EMPLOYERS)
    )
    found: list[Person] = []
    for i, number in enumerate(names.tolist()):
        middle, pair = divmod(number, num_pairs)
        first, last = divmod(pair, len(LAST_NAMES))
        words = [FIRST_NAMES[first], FIRST_NAMES[middle], LAST_NAMES[last]]
        if num_people <= num_pairs:
            del words[1]
        employer = EMPLOYERS[employers[i]]
        found.append(
            Person(
                name=" ".join(words),
                birth_date=f"{DAYS[days[i]]} {MONTHS[months[i]]} {YEARS[years[i]]}",
                birth_city=CITIES[cities[i]],
                university=UNIVERSITIES[universities[i]],
                major=MAJORS[majors[i]],
                employer=employer,
                work_city=WORK_CITIES[employer],
            )
        )
    return tuple(found)


def people_asked_about(config: BiographiesConfig, *, in_training: bool) -> list[Person]:
    """The people whose questions are part of the training data, or those with statements only."""
    everyone = _people(config.num_people, config.seed)
    order = np.random.default_rng([config.seed, 2]).permutation(config.num_people).tolist()
    num_held_out = round(config.num_people * config.held_out_fraction)
    return [everyone[i] for i in sorted(order[num_held_out:] if in_training else order[:num_held_out])]


def questions(config: BiographiesConfig, asked: bool, limit_people: int | None = None) -> list[Question]:
    """Six questions in fixed wordings about each person asked about in training (`asked`), or each held-out one."""
    chosen = people_asked_about(config, in_training=asked)[:limit_people]
    return [_question(person, attribute, QUESTIONS) for person in chosen for attribute in attribute_names]


def statements(config: BiographiesConfig) -> list[Question]:
    """The six facts of each person as beginnings of training sentences, in fixed wordings."""
    return [_question(person, name, STATEMENTS) for person in people(config) for name in attribute_names]


def _question(person: Person, attribute: str, wordings: dict[str, tuple[str, ...]]) -> Question:
    prompt = wordings[attribute][0].format(name=person.name)
    return Question(prompt=prompt, answer=f" {person.value(attribute)}", attribute=attribute, person=person)


class BiographyRecords(Records):
    """Training records: statements (form fact) or whole biographies (form biography), then questions.

    `draw` chooses wordings and the order of sentences with its rng; indexing always uses the first wording.
    """

    def __init__(self, config: BiographiesConfig):
        self.config = config
        self._people = _people(config.num_people, config.seed)
        self._asked = people_asked_about(config, in_training=True)
        self._num_told = len(self._people) * (len(attribute_names) if config.form == "fact" else 1)

    def __reduce__(self) -> tuple[type["BiographyRecords"], tuple[BiographiesConfig]]:
        # Worker processes generate the people again, which is faster than sending them.
        return BiographyRecords, (self.config,)

    def __len__(self) -> int:
        return self._num_told + len(self._asked) * len(attribute_names)

    def __getitem__(self, index: int) -> Record:
        return self._tell(checked(index, len(self)), None)

    def draw(self, index: int, rng: np.random.Generator) -> Record:
        """The record with wordings, and for a biography a sentence order, drawn for this exposure."""
        return self._tell(checked(index, len(self)), rng)

    def _tell(self, index: int, rng: np.random.Generator | None) -> Record:
        if index >= self._num_told:
            return _sentence(self._asked, index - self._num_told, QUESTIONS, rng)
        if self.config.form == "fact":
            return _sentence(self._people, index, STATEMENTS, rng)
        order = range(len(attribute_names)) if rng is None else rng.permutation(len(attribute_names)).tolist()
        life: list[Segment] = []
        for attribute in order:
            prompt, answer = _sentence(self._people, index * len(attribute_names) + attribute, STATEMENTS, rng)
            life.append(Segment(f" {prompt.text}" if life else prompt.text, False))
            life.append(Segment(f"{answer.text}.", True))
        return tuple(life)


class QuestionRecords(Records):
    """Questions about held-out people, or about those asked about in training if none is held out; fixed wordings."""

    def __init__(self, config: BiographiesConfig):
        self.config = config
        held_out = people_asked_about(config, in_training=False)
        self._people = held_out or people_asked_about(config, in_training=True)

    def __reduce__(self) -> tuple[type["QuestionRecords"], tuple[BiographiesConfig]]:
        return QuestionRecords, (self.config,)

    def __len__(self) -> int:
        return len(self._people) * len(attribute_names)

    def __getitem__(self, index: int) -> Record:
        return _sentence(self._people, checked(index, len(self)), QUESTIONS, None)


def _sentence(
    who: Sequence[Person], index: int, wordings: dict[str, tuple[str, ...]], rng: np.random.Generator | None
) -> Record:
    """One prompt and its answer; index counts the attributes of the first person, then of the second, and so on."""
    person, attribute = who[index // len(attribute_names)], attribute_names[index % len(attribute_names)]
    choices = wordings[attribute]
    # random() is several times faster than integers(), and this runs once for every sentence seen.
    wording = choices[0 if rng is None else int(rng.random() * len(choices))]
    return Segment(wording.format(name=person.name), False), Segment(f" {person.value(attribute)}", True)
