"""How row gradients are reduced over the data axis, and what each way costs."""

import jax
import jax.numpy as jnp
import pytest

from memjax.memory.row_grad_reduce import ReduceBytes, choose, reduce_bytes, sums_micro_batches
from memjax.ops.row_gradient import RowGradient


def shapes(tokens, picks=4, columns=256, rows=1000):
    factors = (((tokens, picks), jnp.int32), ((tokens, picks), jnp.float32), ((tokens, columns), jnp.bfloat16))
    gradient = RowGradient._make(jax.ShapeDtypeStruct(*factor) for factor in factors)
    return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16), [gradient, gradient]


def test_bytes_by_hand():
    found = reduce_bytes(*shapes(80), data_axis=4, memory_axis=2)
    # Two layers of 80 tokens, each with 4 picks of 8 bytes and 128 columns of 2 bytes; a quarter is local.
    assert found["all_gather"] == ReduceBytes(2 * 80 * (32 + 256) * 3 // 4, 0, 2 * 80 * (4 * 40 + 256))
    # 1000 rows of 128 columns and a count, 4 bytes each, are sent twice: to be summed, and as sums. Held in memory are
    # the gradient, five blocks of it (here each is all of it), and one layer's gathered and sorted picks with vectors.
    assert found["all_reduce"] == ReduceBytes(2 * 1000 * 129 * 4 * 3 // 4, 6 * 1000 * 128 * 4, 20 * (32 + 160 + 256))


@pytest.mark.parametrize(
    ("tokens", "data_axis", "wanted", "expected"),
    [
        (100, 4, "auto", "all_gather"),
        (100, 4, "all_reduce", "all_reduce"),
        (100_000, 4, "auto", "all_reduce"),
        (100_000, 4, "all_gather", "all_gather"),
        # Nothing crosses `data`, so all_reduce is needed only if the picks cannot be sorted at once.
        (100_000, 1, "auto", "all_gather"),
        (2**28, 1, "auto", "all_reduce"),
    ],
)
def test_auto_chooses_what_needs_fewer_bytes_and_explicit_choices_are_kept(tokens, data_axis, wanted, expected):
    assert choose(wanted, *shapes(tokens), data_axis=data_axis, memory_axis=1) == expected


@pytest.mark.parametrize(
    ("wanted", "tokens", "count", "expected"),
    [
        # 1000 float32 rows of 256 columns and five blocks of them are 6.1 MB; a token of two layers is 1.1 kB, and the
        # same again plus 40 bytes a pick while sorting.
        ("auto", 100, 20, False),
        ("auto", 100, 40, True),
        ("auto", 4000, 1, False),
        ("all_gather", 100, 40, False),
        ("all_reduce", 100, 2, True),
    ],
)
def test_micro_batches_are_summed_where_that_holds_fewer_bytes(wanted, tokens, count, expected):
    assert sums_micro_batches(wanted, *shapes(tokens), count, data_axis=1, memory_axis=1) is expected
