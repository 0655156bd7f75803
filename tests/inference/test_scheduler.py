"""Prompts that wait are read together where that is faster."""

from memjax.inference.scheduler import batches


def test_prompts_of_one_padded_length_are_read_together_and_one_or_two_alone():
    lengths = [20, 100, 21, 22, 101, 23, 24, 20, 20, 17, 30]
    found = batches(lengths, rows=4)
    assert found == [[0, 2, 3, 5], [6, 7, 8, 9], [10], [1], [4]]
    assert batches(lengths[:9], rows=4) == [[0, 2, 3, 5], [6, 7, 8], [1], [4]]
    assert batches([], rows=4) == []
