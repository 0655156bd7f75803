"""Answers are compared by SQuAD's rules."""

import pytest

from memjax.evaluation.question_sets.metrics import best, exact_match, f1, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles", "beatles"),
        ("  an  Apple,\ta day! ", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("a-the-an", "athean"),
        ("the (old) man", "old man"),
        ("December 14, 1972", "december 14 1972"),
        ("Göteborg\N{EN DASH}Malmö", "göteborg\N{EN DASH}malmö"),
        ("ÉCOLE", "école"),
        ("The", ""),
        ("", ""),
        ("\N{HELICOPTER}", "\N{HELICOPTER}"),
    ],
)
def test_articles_case_and_punctuation_do_not_count(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "accepted", "match", "share"),
    [
        ("Paris", "paris.", 1, 1),
        ("the city of Paris", "Paris", 0, 0.5),  # 1 of 3 words, 1 of 1
        ("in Paris France", "Paris in Texas", 0, 2 / 3),
        ("to be or not to be", "to be", 0, 0.5),  # repeated words count as often as they occur in both
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("The", "a", 1, 1),  # both are empty once articles are removed
        ("the", "Paris", 0, 0),
        ("", "", 1, 1),
        ("Paris, Paris!", "Paris", 0, 2 / 3),
        ("\N{INVERTED QUESTION MARK}Qué?", "qué", 0, 0),  # only ASCII punctuation is removed
        ("a\N{NO-BREAK SPACE}b", "b", 1, 1),  # an article, then a space of Unicode
    ],
)
def test_exact_match_and_f1(answer, accepted, match, share):
    assert exact_match(answer, accepted) == match
    assert f1(answer, accepted) == pytest.approx(share)


def test_the_accepted_answer_that_fits_best_counts():
    assert best(exact_match, "UK", ["United Kingdom", "the UK"]) == 1
    assert best(f1, "united kingdom of old", ["UK", "United Kingdom"]) == pytest.approx(2 / 3)
