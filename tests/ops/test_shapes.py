"""Mismatched shapes are refused, naming both, and zero tokens work like any other number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.embedding_bag.api import embedding_bag
from memjax.ops.embedding_dot.api import embedding_dot
from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.product_key_search.api import product_key_search
from memjax.ops.rms_norm.api import rms_norm
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step

TABLE = jnp.ones((8, 4))
RULE = RowRule(state_columns=4)


def indices(*shape):
    return jnp.zeros(shape, jnp.int32)


def update(gradient, state=None, step=None):
    state = RULE.init(8, 4) if state is None else state
    return row_update(TABLE, state, [gradient], RULE, step or row_step(1.0, 0))


MISFITS = {
    "one weight for two picks": (
        lambda: embedding_bag(TABLE, indices(3, 2), jnp.ones((3, 1))),
        r"indices int32\[3, 2\], weights float32\[3, 1\]",
    ),
    "indices that are floats": (
        lambda: embedding_bag(TABLE, jnp.ones((3, 2)), jnp.ones((3, 2))),
        r"indices must be integers .* float32\[3, 2\]",
    ),
    "vectors of one token for three": (
        lambda: embedding_dot(TABLE, indices(3, 2), jnp.ones((1, 4))),
        r"indices int32\[3, 2\], vectors float32\[1, 4\], table float32\[8, 4\]",
    ),
    "vectors of half the width": (
        lambda: embedding_dot(TABLE, indices(3, 2), jnp.ones((6, 2))),
        r"vectors float32\[6, 2\], table float32\[8, 4\]",
    ),
    "a table of whole numbers": (
        lambda: embedding_bag(TABLE.astype(jnp.int32), indices(3, 2), jnp.ones((3, 2))),
        r"embedding_bag: table must be .* of floating-point numbers; found table int32\[8, 4\]",
    ),
    "a table without rows": (
        lambda: embedding_bag(TABLE[:0], indices(3, 2), jnp.ones((3, 2))),
        r"a table without rows cannot be read; found table float32\[0, 4\]",
    ),
    "complex weights": (
        lambda: embedding_bag(TABLE, indices(3, 2), jnp.ones((3, 2), complex)),
        r"a real number; found indices int32\[3, 2\], weights complex64\[3, 2\]",
    ),
    "keys without halves": (
        lambda: product_key_search(jnp.ones((3, 2, 4)), jnp.ones((2, 1, 5, 2)), 2),
        r"queries float32\[3, 2, 4\], keys float32\[2, 1, 5, 2\]",
    ),
    "more slots than 32 bits number": (
        lambda: jax.eval_shape(
            lambda q, k: product_key_search(q, k, 1),
            jnp.ones((1, 1, 2)),
            jax.ShapeDtypeStruct((1, 2, 46341, 1), "float32"),
        ),
        r"n=46341 keys make 2,147,488,281 slots",
    ),
    "one scale for all columns": (
        lambda: rms_norm(jnp.ones((3, 4)), jnp.ones(1), 1e-5),
        r"x float32\[3, 4\], scale float32\[1\]",
    ),
    "sizes with two axes": (
        lambda: grouped_matmul(jnp.ones((3, 4)), jnp.ones((2, 4, 5)), indices(2, 1)),
        r"rows float32\[3, 4\], matrices float32\[2, 4, 5\], sizes int32\[2, 1\]",
    ),
    "a row gradient with one weight for two picks": (
        lambda: update(RowGradient(indices(3, 2), jnp.ones((3, 1)), jnp.ones((3, 4)))),
        r"indices int32\[3, 2\], weights float32\[3, 1\]",
    ),
    "a row gradient with vectors of one token": (
        lambda: update(RowGradient(indices(3, 2), jnp.ones((3, 2)), jnp.ones((1, 4)))),
        r"indices int32\[3, 2\], .* vectors float32\[1, 4\]",
    ),
    "a row gradient with vectors of more tokens": (
        lambda: RowGradient(indices(3, 2), jnp.ones((3, 2)), jnp.ones((5, 4))).dense(8),
        r"indices int32\[3, 2\], .* vectors float32\[5, 4\]",
    ),
    "the state of a smaller table": (
        lambda: update(RowGradient(indices(1, 1), jnp.ones((1, 1)), jnp.ones((1, 4))), state=RULE.init(4, 4)),
        r"\[4, 1\].* for a table \[8, 4\], which has .*\[8, 1\]",
    ),
    "a rate for each row": (
        lambda: update(
            RowGradient(indices(1, 1), jnp.ones((1, 1)), jnp.ones((1, 4))), step=row_step(jnp.ones((8, 1)), 0)
        ),
        r"a step has scalars; found lr float32\[8, 1\]",
    ),
}


def test_a_table_of_whole_numbers_and_the_name_of_a_rule_are_refused(as_users_call):
    one = [RowGradient(indices(1, 1), jnp.ones((1, 1)), jnp.ones((1, 4)))]
    with pytest.raises(ValueError, match=r"floating-point numbers; found table int32\[8, 4\]"):
        row_update(TABLE.astype(jnp.int32), {}, one, RowRule(kind="sgd"), row_step(0.5, 0))
    rule: Any = "sgd"
    with pytest.raises(TypeError, match=r"rule must be a memjax\.RowRule, found str"):
        row_update(TABLE, {}, one, rule, row_step(0.5, 0))


@pytest.mark.parametrize("case", MISFITS)
def test_shapes_that_do_not_fit_are_refused_by_name(as_users_call, case):
    call, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("batch", [(0,), (3, 0)], ids=str)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_zero_tokens_give_nothing_and_zero_gradients(implementation, batch):
    named = {"implementation": implementation}
    assert embedding_bag(TABLE, indices(*batch, 2), jnp.ones((*batch, 2)), **named).shape == (*batch, 4)
    assert embedding_dot(TABLE, indices(*batch, 2), jnp.ones((*batch, 4)), **named).shape == (*batch, 2)
    assert rms_norm(jnp.ones((*batch, 4)), jnp.ones(4), 1e-5, **named).normed.shape == (*batch, 4)
    keys = jnp.ones((2, 2, 5, 3))
    scores, slots = product_key_search(jnp.ones((*batch, 2, 6)), keys, 2, **named)
    assert scores.shape == slots.shape == (*batch, 2, 2)
    d_table = jax.grad(lambda t: embedding_bag(t, indices(*batch, 2), jnp.ones((*batch, 2)), **named).sum())(TABLE)
    np.testing.assert_array_equal(d_table, np.zeros((8, 4)))
    assert grouped_matmul(jnp.ones((0, 4)), jnp.ones((2, 4, 5)), indices(2), **named).shape == (0, 5)
    gradient = RowGradient(indices(0, 2), jnp.ones((0, 2)), jnp.ones((0, 4)))
    table, state = row_update(TABLE, RULE.init(8, 4), [gradient], RULE, row_step(1.0, 0), **named)
    np.testing.assert_array_equal(table, TABLE)
    assert not np.any(state["second_moment"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "SGD"}, "kind='SGD' is unknown; known: rowwise_adam"),
        ({"kind": None}, "kind=None is unknown"),
        ({"beta2": 1.5}, "beta2=1.5 must be in 0..1 and below 1"),
        ({"beta1": float("nan")}, "beta1=nan must be"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"state_columns": 2.5}, "state_columns=2.5 must be a whole number"),
        ({"moment_dtype": jnp.int32}, "moment_dtype=.*int32.* must be one of float32, bfloat16, float64"),
        ({"moment_dtype": "float16"}, "moment_dtype='float16' must be one of float32, bfloat16, float64"),
        ({"moment_dtype": jnp.float8_e5m2}, "moment_dtype=.*float8_e5m2.* must be one of"),
        ({"moment_dtype": "half of it"}, "moment_dtype='half of it' must be one of"),
        ({"moment_dtype": None}, "moment_dtype=None must be one of"),
    ],
)
def test_rules_of_the_config_hold_for_row_rules(as_users_call, wrong, message):
    with pytest.raises(ValueError, match=message):
        RowRule(**wrong)
