import dataclasses
import pickle
import re

import numpy as np
import pytest

from memjax.config.data import BiographiesConfig
from memjax.data.sources import biographies
from memjax.data.sources.biographies import BiographyRecords, QuestionRecords, attribute_names, people, questions

CONFIG = BiographiesConfig(num_people=60, held_out_fraction=0.25, seed=3)
LISTS = {
    "birth_city": biographies.CITIES,
    "university": biographies.UNIVERSITIES,
    "major": biographies.MAJORS,
    "employer": biographies.EMPLOYERS,
    "work_city": biographies.CITIES,
}


def text_of(record) -> str:
    return "".join(segment.text for segment in record)


def exposures(config, rng):
    source = BiographyRecords(config)
    return [source.draw(i, rng) for i in range(len(source))]


def test_lists_hold_different_words_and_cities_follow_from_employers():
    sizes = {name: len(words) for name, words in LISTS.items()}
    assert sizes == {"birth_city": 100, "university": 100, "major": 50, "employer": 100, "work_city": 100}
    for words in (*LISTS.values(), biographies.FIRST_NAMES, biographies.LAST_NAMES):
        assert len(set(words)) == len(words)
        assert all(re.fullmatch("[A-Z][a-z]+", word) for word in words)
    assert set(biographies.WORK_CITIES) == set(biographies.EMPLOYERS)
    assert set(biographies.WORK_CITIES.values()) == set(biographies.CITIES)


@pytest.mark.parametrize("num_people", [1, 800, 20_000, 20_001])
def test_everybody_has_a_unique_name(num_people):
    everyone = people(BiographiesConfig(num_people=num_people))
    assert len({person.name for person in everyone}) == num_people
    assert {len(person.name.split()) for person in everyone} == {2 if num_people <= 20_000 else 3}


def test_too_many_people_are_refused():
    with pytest.raises(ValueError, match="num_people=2000001 must be at most 2000000"):
        people(BiographiesConfig(num_people=2_000_001))


def test_every_value_occurs_and_work_cities_follow():
    everyone = people(BiographiesConfig(num_people=3000))
    for attribute, words in LISTS.items():
        assert {person.value(attribute) for person in everyone} == set(words)
    dates = [re.fullmatch(r"(\d+) ([A-Z][a-z]+) (19\d\d)", person.birth_date) for person in everyone]
    parts = [date.groups() for date in dates if date]
    assert len(parts) == len(everyone)
    assert [len({part[i] for part in parts}) for i in range(3)] == [28, 12, 60]
    assert all(person.work_city == biographies.WORK_CITIES[person.employer] for person in everyone)


def test_people_depend_on_their_seed_alone():
    assert people(CONFIG) == people(dataclasses.replace(CONFIG, form="biography", held_out_fraction=1.0))
    assert people(CONFIG) != people(dataclasses.replace(CONFIG, seed=4))


@pytest.mark.parametrize(("fraction", "num_held_out"), [(0.0, 0), (0.25, 15), (1.0, 60)])
def test_people_are_either_asked_about_or_held_out(fraction, num_held_out):
    config = dataclasses.replace(CONFIG, held_out_fraction=fraction)
    asked, held_out = (
        biographies.people_asked_about(config, in_training=True),
        biographies.people_asked_about(config, in_training=False),
    )
    assert len(held_out) == num_held_out
    assert sorted(p.name for p in asked + held_out) == sorted(p.name for p in people(config))


@pytest.mark.parametrize("form", ["fact", "biography"])
def test_training_states_everybodys_facts_and_asks_only_about_the_asked(form):
    config = dataclasses.replace(CONFIG, form=form)
    asked = {person.name for person in biographies.people_asked_about(config, in_training=True)}
    records = exposures(config, np.random.default_rng(0))
    assert len(records) == 60 * (6 if form == "fact" else 1) + 45 * 6
    questioned = [text_of(record) for record in records if "?" in text_of(record)]
    told = [text_of(record) for record in records if "?" not in text_of(record)]
    for person in people(config):
        assert sum(person.name in text for text in questioned) == (6 if person.name in asked else 0)
        mine = [text for text in told if person.name in text]
        assert len(mine) == (6 if form == "fact" else 1)
        if form == "biography":
            assert mine[0].count(person.name) == 6
            assert mine[0].count(".") == 6
        for attribute in attribute_names:
            assert any(re.search(rf" {person.value(attribute)}(\.|$)", text) for text in mine)


@pytest.mark.parametrize("form", ["fact", "biography"])
def test_only_answers_are_learned_and_they_end_their_sentence(form):
    everyone = people(CONFIG)
    values = {f" {person.value(attribute)}" for person in everyone for attribute in attribute_names}
    for record in exposures(dataclasses.replace(CONFIG, form=form), np.random.default_rng(1)):
        assert [segment.learned for segment in record] == [False, True] * (len(record) // 2)
        assert all(segment.text.removesuffix(".") in values for segment in record[1::2])
        assert all(any(person.name in segment.text for person in everyone) for segment in record[::2])
        assert "  " not in text_of(record)
        assert "{" not in text_of(record)


def test_wordings_and_orders_are_drawn_again():
    rng = np.random.default_rng(0)
    life = BiographyRecords(dataclasses.replace(CONFIG, form="biography"))
    texts = [text_of(life.draw(7, rng)) for _ in range(20)]
    assert len(set(texts)) == 20
    person = people(CONFIG)[7]
    orders = {tuple(sorted(attribute_names, key=lambda a: text.index(f" {person.value(a)}."))) for text in texts}
    assert len(orders) > 10
    fact, question = BiographyRecords(CONFIG), 60 * 6 + 1
    assert len({text_of(fact.draw(7, rng)) for _ in range(100)}) == 5
    assert len({text_of(fact.draw(question, rng)) for _ in range(50)}) == 2
    again = np.random.default_rng(0)
    assert text_of(life.draw(7, again)) == texts[0]
    assert life[7] == life[7]


def test_no_wording_serves_two_attributes():
    wordings = [
        wording
        for table in (biographies.STATEMENTS, biographies.QUESTIONS)
        for ways in table.values()
        for wording in ways
    ]
    assert len(set(wordings)) == len(wordings)
    assert all(wording.count("{name}") == 1 and wording == wording.strip() for wording in wordings)
    assert all(len(biographies.STATEMENTS[a]) >= 5 and len(biographies.QUESTIONS[a]) >= 2 for a in attribute_names)


def test_questions_ask_for_the_six_values_of_the_right_people():
    for asked, who in (
        (True, biographies.people_asked_about(CONFIG, in_training=True)),
        (False, biographies.people_asked_about(CONFIG, in_training=False)),
    ):
        found = questions(CONFIG, asked, None)
        assert [(q.person, q.attribute) for q in found] == [(p, a) for p in who for a in attribute_names]
        for question in found:
            assert question.answer == " " + getattr(question.person, question.attribute)
            assert question.person.name in question.prompt
            assert question.prompt.endswith("? Answer:")
        assert questions(CONFIG, asked, 2) == found[:12]


def test_statements_are_told_in_training():
    config = dataclasses.replace(CONFIG, num_people=3)
    told = {text_of(record) for seed in range(60) for record in exposures(config, np.random.default_rng(seed))}
    found = biographies.statements(config)
    assert len(found) == 18
    assert {statement.prompt + statement.answer for statement in found} <= told


def test_validation_asks_the_held_out_or_else_the_asked():
    for fraction, asked in ((0.25, False), (0.0, True)):
        config = dataclasses.replace(CONFIG, held_out_fraction=fraction)
        source = QuestionRecords(config)
        expected = [question.prompt + question.answer for question in questions(config, asked)]
        assert [text_of(source[i]) for i in range(len(source))] == expected


def test_sources_travel():
    for source in (BiographyRecords(CONFIG), QuestionRecords(CONFIG)):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[11] == source[11]
