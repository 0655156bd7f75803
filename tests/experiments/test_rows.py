"""Facts as token arrays equal the library's sentences, and the order shows each as often as stated."""

import numpy as np
import pytest
from factlab.rows import BOS, EOS, PAD, biography_rows, draw_order

from memjax.config.data import BiographiesConfig
from memjax.data.sources import biographies

CONFIG = BiographiesConfig(num_people=30)


@pytest.fixture(scope="module")
def rows():
    return biography_rows(CONFIG)


def test_a_row_is_the_begin_token_the_librarys_sentence_and_the_end_with_one_token_for_each_word(rows):
    word_of: dict[int, str] = {}
    for number, (person, attribute) in enumerate(
        (person, attribute) for person in biographies.people(CONFIG) for attribute in biographies.attribute_names
    ):
        for wording, template in enumerate(biographies.STATEMENTS[attribute]):
            prompt = template.format(name=person.name).split()
            answer = person.value(attribute).split()
            begin, end = rows.answers[number, wording]
            row = rows.tokens[number, wording].tolist()
            assert (begin, end) == (1 + len(prompt), 1 + len(prompt) + len(answer) + 1)
            assert row[0] == BOS
            assert row[end - 1] == EOS
            assert set(row[end:]) <= {PAD}
            for token, word in zip(row[1 : end - 1], prompt + answer, strict=True):
                assert word_of.setdefault(token, word) == word
    assert len(set(word_of.values())) == len(word_of) <= rows.vocab_size - 3


def test_a_persons_information_is_that_of_the_values_drawn(rows):
    # 28 days x 12 months x 60 years, 100 cities, 100 universities, 50 majors, 100 employers (which fix the work city).
    assert rows.bits.reshape(30, 6)[0].sum() == pytest.approx(np.log2(28 * 12 * 60 * 100 * 100 * 50 * 100), abs=1e-9)


def test_every_epoch_shows_every_fact_once_in_a_wording_that_training_may_show(rows):
    kept = rows._replace(first_wording=np.arange(180) % 2)
    order = draw_order(kept, batch_size=18, steps=40, seed=1)
    fact, wording = order.reshape(-1) // 5, order.reshape(-1) % 5
    for epoch in range(4):
        assert sorted(fact[180 * epoch : 180 * (epoch + 1)]) == list(range(180))
    assert set(wording[fact % 2 == 0]) == {0, 1, 2, 3, 4}
    assert set(wording[fact % 2 == 1]) == {1, 2, 3, 4}
    often = draw_order(biography_rows(CONFIG, told=(0, 1, 4)), batch_size=30, steps=20, seed=1).reshape(-1) // 5
    assert np.bincount(often, minlength=180).reshape(10, 3, 6).tolist() == [[[0] * 6, [2] * 6, [8] * 6]] * 10
    assert (order != draw_order(kept, batch_size=18, steps=40, seed=2)).any()
