"""The update through a dense gradient equals loops over picks and rows, however it is split into pieces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update import dense
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import RowRule, row_step
from memjax.ops.row_update.segments import sorted_picks

ROWS, COLUMNS, UNREAD = 13, 8, 5


NOTHING = jnp.zeros((ROWS, COLUMNS)), jnp.zeros(ROWS, bool)


def draw_gradients():
    """Gradients of two layers, 5 tokens with 3 picks and 9 with one; integers, so the order of sums does not matter.

    Row UNREAD and those after it are never read, except that one pick of row UNREAD has weight 0.
    """
    rng, gradients = np.random.default_rng(0), []
    for tokens, picks in ((5, 3), (9, 1)):
        indices, weights = rng.integers(UNREAD, size=(tokens, picks)), rng.integers(1, 5, size=(tokens, picks))
        if picks == 1:
            indices[4], weights[4] = UNREAD, 0
        vectors = rng.integers(-9, 9, size=(tokens, COLUMNS))
        factors = ((indices, jnp.int32), (weights, jnp.float32), (vectors, jnp.float32))
        gradients.append(RowGradient._make(jnp.asarray(*factor) for factor in factors))
    return gradients


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("piece", [1 << 26, 6, 1], ids=lambda piece: f"{piece} picks")
def test_sum_and_touched_rows_equal_a_loop_over_picks(implementation, piece):
    gradients = draw_gradients()
    expected = np.zeros((ROWS, COLUMNS))
    for indices, weights, vectors in jax.tree.map(np.asarray, gradients):
        for token, pick in np.ndindex(indices.shape):
            expected[indices[token, pick]] += weights[token, pick] * vectors[token]
    total, touched = jax.jit(partial(dense.summed, piece_picks=piece, implementation=implementation))(
        gradients, NOTHING
    )
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(touched, np.arange(ROWS) <= UNREAD)


@pytest.mark.parametrize("rows", [ROWS, 5], ids=lambda rows: f"blocks of {rows} rows")
@pytest.mark.parametrize("kind", ["rowwise_adam", "adam"])
def test_touched_rows_are_updated_as_by_row_update_bit_for_bit(kind, rows):
    rule, gradients = RowRule(kind=kind, state_columns=4), draw_gradients()
    table = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, COLUMNS)), jnp.bfloat16)
    state = rule.init(ROWS, COLUMNS, table.dtype)
    step = row_step(1e-2, 3, seed=7, first_column=16)

    @jax.jit
    def by_dense(table, state, gradients, step):
        return dense.update_touched(
            table, state, *dense.summed(gradients, NOTHING), rule, step, block_bytes=rows * COLUMNS * 4
        )

    got = by_dense(table, state, gradients, step)
    expected = jax.jit(partial(row_update, rule=rule))(table, state, gradients, step=step)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    # A row with a zero gradient counts as read, so Adam's moments may move it; rows that were never read stay.
    assert np.any(np.asarray(got[0] != table)[:UNREAD])
    np.testing.assert_array_equal(got[0][UNREAD + 1 :], table[UNREAD + 1 :])

    unchanged = by_dense(table, state, gradients, step._replace(ok=jnp.asarray(False)))
    jax.tree.map(np.testing.assert_array_equal, unchanged, (table, state))


def test_a_table_updated_in_blocks_is_never_copied():
    rule, table = RowRule(state_columns=64), jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    state = jax.eval_shape(lambda: rule.init(*table.shape))
    touched = jax.ShapeDtypeStruct(table.shape[:1], jnp.bool_)

    def update(table, state, gradient, touched):
        return dense.update_touched(table, state, gradient, touched, rule, row_step(1e-2, 0), block_bytes=1 << 16)

    memory = jax.jit(update, donate_argnums=(0, 1)).lower(table, state, table, touched).compile().memory_analysis()
    assert memory is not None
    bytes_of_table = table.size * 4
    assert memory.alias_size_in_bytes >= bytes_of_table
    assert memory.temp_size_in_bytes < bytes_of_table / 2


def test_more_picks_than_32_bits_can_count_are_refused_with_the_way_out():
    factors = (((1 << 24, 128), jnp.int32), ((1 << 24, 128), jnp.float32), ((1 << 24, 8), jnp.float32))
    gradient = RowGradient._make(jax.ShapeDtypeStruct(*factor) for factor in factors)
    with pytest.raises(
        ValueError, match=r"2,147,483,648 picks cannot be sorted at once, .* mesh\.row_grad_reduce: all_reduce"
    ):
        jax.eval_shape(sorted_picks, [gradient])
