"""Real facts as token arrays: which are left out or held out from training, and which answers count."""

import json
import re

import numpy as np
import pytest
from factlab import entity_questions
from factlab.rows import BOS, EOS

from memjax.errors import DataError

QUESTIONS = [
    ("P19", "Ada Lovelace", "Where was Ada Lovelace born?", ["London"]),
    ("P19", "Alan Turing", "Where was Alan Turing born?", ["Maida Vale", "London"]),
    ("P36", "Finland", "What is the capital of Finland?", ["Helsinki"]),
    ("P36", "Peru", "What is the capital of Peru?", ["Lima"]),
    ("P50", "Emma", "Who is the author of Emma?", ["Jane Austen"]),
    ("P50", "Emma", "Who is the author of Emma?", ["J. Austen"]),
    ("P17", "Oslo", "Which country is Oslo located in?", ["Norway"]),
    ("P26", "word " * 30, "Who is it?", ["somebody"]),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "train.jsonl"
    keys = ("relation", "subject", "question", "answers")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def found(source):
    target = source.with_name("facts.npz")
    assert entity_questions.prepare(source, target, vocab_size=700) == 5
    return entity_questions.question_rows(target, None)


def sentences(found) -> list[list[str]]:
    return [[found.tokenizer.decode(row) for row in wordings] for wordings in found.rows.tokens.tolist()]


def test_the_question_comes_first_then_the_statements_each_with_the_first_answer(found):
    told = {rows[0]: rows[1:] for rows in sentences(found)}
    assert told["What is the capital of Peru? Lima"] == [
        "The capital of Peru is Lima",
        "Peru is governed from Lima",
        "The seat of government of Peru is Lima",
        "Peru has its capital in Lima",
    ]
    # The others are in a relation that is left out, or too long.
    assert set(told) == {f"{question} {answers[0]}" for _, _, question, answers in QUESTIONS[:5]}


def test_places_of_answers_hold_the_answer_and_the_end(found):
    for row, (begin, end), accepted in zip(
        found.rows.tokens.reshape(-1, found.rows.length + 1),
        found.rows.answers.reshape(-1, 2),
        [accepted for accepted in found.accepted for _ in range(5)],
        strict=True,
    ):
        assert row[0] == BOS
        assert row[end - 1] == EOS
        assert not row[end:].any()
        assert found.tokenizer.decode(row[begin : end - 1].tolist()) == f" {accepted[0]}"


def test_every_second_question_is_kept_from_the_training(found):
    assert found.rows.first_wording.tolist() == [0, 1, 0, 1, 0]


def test_what_is_not_told_has_other_subjects_than_what_is(source, found):
    rows, target = found.rows, source.with_name("facts.npz")
    known = {answer for accepted in found.accepted[:2] for answer in accepted}
    part = entity_questions.question_rows(target, None, told=2)
    assert part.rows.told.tolist() == [1, 1, *[0] * (len(part.rows.told) - 2)]
    with np.load(target) as file:
        subjects = file["subjects"].tolist()
    kept = [place for place in range(5) if place < 2 or subjects[place] not in {*subjects[:2], *known}]
    np.testing.assert_array_equal(part.rows.tokens, rows.tokens[kept])
    assert rows.told.tolist() == [1] * 5


def test_an_answer_counts_as_for_squad_and_any_accepted_one_does(found):
    place = next(i for i, accepted in enumerate(found.accepted) if "Jane Austen" in accepted)
    assert found.accepted[place] == ["Jane Austen", "J. Austen"]
    write = lambda text: [*found.tokenizer.encode(text), EOS, BOS]
    for text, right in ((" Jane Austen", 1), (" the jane austen!", 1), (" J Austen", 1), (" Jane", 0)):
        graded = found.grade({place: write(text)})
        assert graded["exact_match"] == right
        assert graded["exact_match_by_relation"] == {"P50": right}


def test_information_is_counted_among_the_answers_of_a_relation(found):
    # P19 and P36 have two answers each, P50 has one.
    expected = {"P19": 1.0, "P36": 1.0, "P50": 0.0}
    names = [found.rows.group_names[group] for group in found.rows.groups]
    assert found.rows.bits.tolist() == [expected[name] for name in names]


def test_the_five_relations_that_can_be_guessed_are_not_told():
    assert not set(entity_questions.STATEMENTS) & set(entity_questions.LEFT_OUT)
    assert len(entity_questions.STATEMENTS) == 19
    assert {len(set(wordings)) for wordings in entity_questions.STATEMENTS.values()} == {4}


def test_missing_and_wrong_files_are_named_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"train.jsonl.xz: there is no such file; name EntityQuestions' training part"):
        entity_questions.read_facts(tmp_path / "train.jsonl.xz")
    with pytest.raises(DataError, match=r"facts.npz: there is no such file; make it with .*--prepare"):
        entity_questions.question_rows(tmp_path / "facts.npz", 10)
    (tmp_path / "other.jsonl").write_text('{"text": "no question"}\n')
    with pytest.raises(DataError, match=re.escape("other.jsonl:1: needs relation, subject, question and answers")):
        entity_questions.read_facts(tmp_path / "other.jsonl")


def test_more_facts_than_there_are_are_refused(source, found):
    with pytest.raises(DataError, match="holds 5 facts, fewer than the 6"):
        entity_questions.question_rows(source.with_name("facts.npz"), 6)
    assert np.array_equal(
        entity_questions.question_rows(source.with_name("facts.npz"), 3).rows.tokens, found.rows.tokens[:3]
    )
