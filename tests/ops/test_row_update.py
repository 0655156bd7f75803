import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.ops import dispatch
from memjax.ops.row_gradient import RowGradient
from memjax.ops.row_update.api import row_update
from memjax.ops.row_update.rules import NormRule, RowRule, row_step

ROWS, COLUMNS = 11, 8
IMPLEMENTATIONS = ["triton", "xla", "reference"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
RULES = {
    "rowwise_adam": RowRule(state_columns=4, beta2=0.9, eps=1e-3),
    "rowwise_adagrad": RowRule(kind="rowwise_adagrad", state_columns=2, eps=1e-3),
    "adam": RowRule(kind="adam", beta1=0.8, beta2=0.9, eps=1e-3, moment_dtype=jnp.float32),
    "sgd": RowRule(kind="sgd"),
}

# Every implementation with its default chunk, and the sorted ones with chunks of so many of the 24 picks, so that rows
# span several chunks and chunks end everywhere; chunks of 4 need four rounds of the Triton form.
XLA_FORMS = [(name, None) for name in IMPLEMENTATIONS[1:]] + [("xla", chunk) for chunk in (1, 5, 8, 99)]
TRITON_FORMS = [("triton", None), ("triton", 4)]
every_form = pytest.mark.parametrize(("implementation", "chunk"), TRITON_FORMS + XLA_FORMS)
# The interpreter takes seconds for several chunks, so the quick tests cover them with one rule only.
every_form_and_rule = pytest.mark.parametrize(
    ("implementation", "chunk", "kind"),
    [
        pytest.param(
            *form, kind, marks=[pytest.mark.slow] if form == TRITON_FORMS[1] and kind != "rowwise_adam" else []
        )
        for form in TRITON_FORMS + XLA_FORMS
        for kind in RULES
    ],
)
every_xla_form = pytest.mark.parametrize(("implementation", "chunk"), XLA_FORMS)
every_triton_form = pytest.mark.parametrize(("implementation", "chunk"), TRITON_FORMS)
# Triton's interpreter is several hundred times slower than the other implementations.
few_examples = settings(max_examples=max(2, settings().max_examples // 12))


@cache
def compiled(rule, implementation, chunk, width):
    if chunk is None:
        return jax.jit(lambda *arguments: row_update(*arguments, implementation=implementation), static_argnums=3)
    size = {"chunk": chunk} if implementation == "triton" else {"chunk_bytes": chunk * width}
    module = dispatch.load("row_update", implementation)
    return jax.jit(lambda *arguments: module.row_update(*arguments, **size), static_argnums=3)


def update(table, state, gradients, rule, step, *, implementation, chunk):
    width = table.shape[1] * max(4, table.dtype.itemsize)
    return compiled(rule, implementation, chunk, width)(table, state, gradients, rule, step)


def draw_gradients(rng, picks_of="any rows"):
    """Draws gradients of two layers: 5 tokens with 3 picks each, and 9 tokens with one."""
    gradients = []
    for tokens, picks in ((5, 3), (9, 1)):
        indices = {
            "any rows": rng.integers(ROWS, size=(tokens, picks)),
            "one row": np.full((tokens, picks), 6),
            "few rows": rng.choice([0, 3, ROWS - 1], size=(tokens, picks)),
        }[picks_of]
        gradients.append((indices, rng.normal(size=(tokens, picks)), rng.normal(size=(tokens, COLUMNS))))
    return gradients


def as_arrays(gradients, dtype=None):
    return [
        RowGradient._make([np.asarray(indices, np.int32), np.asarray(weights, dtype), np.asarray(vectors, dtype)])
        for indices, weights, vectors in gradients
    ]


def by_hand(table, state, gradients, rule, lr, step):
    """The update rules as a loop over picks, then over the picked rows."""
    summed = {}
    for indices, weights, vectors in gradients:
        for token, pick in np.ndindex(indices.shape):
            row = indices[token, pick]
            summed[row] = summed.get(row, 0) + weights[token, pick] * vectors[token]
    table, state = table.copy(), {name: array.copy() for name, array in state.items()}
    for row, gradient in summed.items():
        if rule.kind == "sgd":
            table[row] -= lr * gradient
        elif rule.kind == "adam":
            first = rule.beta1 * state["first_moment"][row] + (1 - rule.beta1) * gradient
            second = rule.beta2 * state["second_moment"][row] + (1 - rule.beta2) * gradient**2
            state["first_moment"][row], state["second_moment"][row] = first, second
            first, second = first / (1 - rule.beta1 ** (step + 1)), second / (1 - rule.beta2 ** (step + 1))
            table[row] -= lr * first / (np.sqrt(second) + rule.eps)
        else:
            for block in range(COLUMNS // rule.state_columns):
                columns = slice(block * rule.state_columns, (block + 1) * rule.state_columns)
                square, old = np.mean(gradient[columns] ** 2), state["second_moment"][row, block]
                if rule.kind == "rowwise_adagrad":
                    new = old + square
                else:
                    new = square if old == 0 else rule.beta2 * old + (1 - rule.beta2) * square
                state["second_moment"][row, block] = new
                table[row, columns] -= lr * gradient[columns] / (np.sqrt(new) + rule.eps)
    return table, state


seeds = st.integers(0, 2**32 - 1)


def check_steps_equal_a_loop_over_picks_and_rows(implementation, chunk, kind, seed, picks_of):
    rng, rule = np.random.default_rng(seed), RULES[kind]
    # Kernels compute in float32, the others in the table's dtype.
    dtype, tolerance = (np.float32, 2e-5) if implementation == "triton" else (np.float64, 1e-11)
    if kind == "adam":
        rule = dataclasses.replace(rule, moment_dtype=dtype)
    with jax.enable_x64(dtype == np.float64):
        table = rng.normal(size=(ROWS, COLUMNS))
        state = {name: np.asarray(array) for name, array in rule.init(ROWS, COLUMNS, dtype).items()}
        expected, expected_state = table, state
        for number in range(3):
            gradients, lr = draw_gradients(rng, picks_of), 0.1 * (number + 1)
            expected, expected_state = by_hand(expected, expected_state, gradients, rule, lr, number)
            table, state = update(
                jnp.asarray(table, dtype),
                state,
                as_arrays(gradients, dtype),
                rule,
                row_step(lr, number),
                implementation=implementation,
                chunk=chunk,
            )
            np.testing.assert_allclose(table, expected, rtol=tolerance, atol=tolerance)
            assert state.keys() == expected_state.keys()
            for name, array in state.items():
                np.testing.assert_allclose(array, expected_state[name], rtol=tolerance, atol=tolerance)


@every_xla_form
@pytest.mark.parametrize("kind", RULES)
@given(seed=seeds, picks_of=st.sampled_from(["any rows", "one row", "few rows"]))
def test_steps_equal_a_loop_over_picks_and_rows(implementation, chunk, kind, seed, picks_of):
    check_steps_equal_a_loop_over_picks_and_rows(implementation, chunk, kind, seed, picks_of)


@pytest.mark.parametrize(
    ("implementation", "chunk", "kind"),
    [
        *(pytest.param("triton", None, kind, marks=[pytest.mark.slow] * (kind == "rowwise_adagrad")) for kind in RULES),
        pytest.param("triton", 4, "rowwise_adam", marks=pytest.mark.slow),
    ],
)
@few_examples
@given(seed=seeds, picks_of=st.sampled_from(["any rows", "one row", "few rows"]))
def test_steps_equal_a_loop_over_picks_and_rows_in_triton(implementation, chunk, kind, seed, picks_of):
    check_steps_equal_a_loop_over_picks_and_rows(implementation, chunk, kind, seed, picks_of)


@every_implementation
def test_the_rule_that_measures_adds_mean_squares_and_changes_no_row(implementation):
    rng, rule = np.random.default_rng(0), NormRule(state_columns=4)
    table = jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.bfloat16)
    gradient = RowGradient(
        jnp.asarray([[1, 3], [3, 9]]),
        jnp.asarray([[2.0, 1.0], [-1.0, jnp.inf]]),
        jnp.asarray(rng.normal(size=(2, COLUMNS))),
    )
    new, state = row_update(
        table, rule.init(ROWS, COLUMNS), [gradient], rule, row_step(1.0, 0), implementation=implementation
    )
    assert bits(new) == bits(table)
    first, second = np.asarray(gradient.vectors, np.float64).reshape(2, 2, 4)
    expected = np.zeros((ROWS, 2))
    expected[1], expected[3], expected[9] = (
        np.mean(g**2, axis=-1) for g in (2 * first, first - second, np.inf * second)
    )
    np.testing.assert_allclose(state["second_moment"], expected, rtol=1e-5)


def bits(tree):
    return [np.asarray(leaf).view(np.uint8).tobytes() for leaf in jax.tree.leaves(tree)]


def draw_exact(seed):
    """A bfloat16 table, and gradients whose products and sums are exact in float32 until the final rounding."""
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.uniform(0.5, 2, size=(ROWS, COLUMNS)), jnp.bfloat16)
    gradients = []
    for tokens, picks in ((5, 3), (9, 1)):
        weights, vectors = rng.integers(-4, 5, size=(tokens, picks)), rng.integers(-8, 9, size=(tokens, COLUMNS))
        gradients.append((rng.integers(ROWS, size=(tokens, picks)), weights, vectors))
    return table, as_arrays(gradients, jnp.float32)


# A power of two, well below the spacing of bfloat16, so that the result depends on the random bits alone.
EXACT_LR = 2.0**-13


def check_bfloat16_rows_are_bit_equal_in_every_form(implementation, chunk, seed):
    table, gradients = draw_exact(seed)
    arguments = (table, {}, gradients, RULES["sgd"], row_step(EXACT_LR, 3, seed=seed))
    got, _ = update(*arguments, implementation=implementation, chunk=chunk)
    expected, _ = update(*arguments, implementation="reference", chunk=None)
    assert got.dtype == jnp.bfloat16
    assert bits(got) == bits(expected)
    assert bits(got) != bits(table)


@every_xla_form
@given(seed=seeds)
def test_bfloat16_rows_are_bit_equal_in_every_form(implementation, chunk, seed):
    check_bfloat16_rows_are_bit_equal_in_every_form(implementation, chunk, seed)


@every_triton_form
@few_examples
@given(seed=seeds)
def test_bfloat16_rows_are_bit_equal_in_every_form_in_triton(implementation, chunk, seed):
    check_bfloat16_rows_are_bit_equal_in_every_form(implementation, chunk, seed)


def check_column_shards_get_the_bits_of_the_whole(implementation, chunk, seed):
    table, gradients = draw_exact(seed)

    def run(table, gradients, first):
        return update(
            table,
            {},
            gradients,
            RULES["sgd"],
            row_step(EXACT_LR, 3, seed=seed, first_column=first),
            implementation=implementation,
            chunk=chunk,
        )[0]

    whole = np.asarray(run(table, gradients, 0))
    for first in (0, 4):
        columns = slice(first, first + 4)
        parts = [gradient._replace(vectors=np.asarray(gradient.vectors)[:, columns]) for gradient in gradients]
        assert bits(run(np.asarray(table)[:, columns], parts, first)) == bits(whole[:, columns])


@every_xla_form
@given(seed=seeds)
def test_column_shards_get_the_bits_of_the_whole(implementation, chunk, seed):
    check_column_shards_get_the_bits_of_the_whole(implementation, chunk, seed)


@pytest.mark.parametrize(
    ("implementation", "chunk"), [TRITON_FORMS[0], pytest.param(*TRITON_FORMS[1], marks=pytest.mark.slow)]
)
@few_examples
@given(seed=seeds)
def test_column_shards_get_the_bits_of_the_whole_in_triton(implementation, chunk, seed):
    check_column_shards_get_the_bits_of_the_whole(implementation, chunk, seed)


@every_form_and_rule
def test_nothing_is_written_when_not_ok(implementation, chunk, kind):
    rule = RULES[kind] if kind != "adam" else RowRule(kind="adam", moment_dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.bfloat16)
    state = {name: jnp.ones_like(array) for name, array in rule.init(ROWS, COLUMNS).items()}
    gradients = as_arrays(draw_gradients(rng), jnp.float32)
    gradients[0] = gradients[0]._replace(vectors=np.where(np.arange(5)[:, None] == 2, np.nan, gradients[0].vectors))

    def run(ok):
        return update(
            table, state, gradients, rule, row_step(0.1, 0, ok=ok), implementation=implementation, chunk=chunk
        )

    assert bits(run(False)) == bits((table, state))
    assert bits(run(True)) != bits((table, state))


@every_form
def test_only_picked_rows_and_their_state_change(implementation, chunk):
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.float32)
    state = {"second_moment": jnp.ones((ROWS, 2))}
    gradients = as_arrays(draw_gradients(rng, "few rows"), jnp.float32)
    new, new_state = update(
        table, state, gradients, RULES["rowwise_adam"], row_step(0.1, 0), implementation=implementation, chunk=chunk
    )
    picked = np.isin(np.arange(ROWS), [0, 3, ROWS - 1])
    np.testing.assert_array_equal(np.any(new != table, axis=1), picked)
    np.testing.assert_array_equal(np.any(new_state["second_moment"] != 1, axis=1), picked)


@every_form
@pytest.mark.parametrize("kind", ["adam", "rowwise_adam"])
def test_picks_of_padding_touch_no_row_and_no_state(implementation, chunk, kind):
    rng, rule = np.random.default_rng(3), RULES[kind]
    table = jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.float32)
    state = {name: jnp.ones_like(array) for name, array in rule.init(ROWS, COLUMNS).items()}
    real, padded = as_arrays(draw_gradients(rng), jnp.float32), []
    for gradient in real:
        # Append as many padding tokens, with non-zero values that must not be used.
        twice = RowGradient._make(np.concatenate([factor, factor]) for factor in gradient)
        token_mask = np.arange(len(twice.indices)) < len(gradient.indices)
        padded.append(twice.without_padding(jnp.asarray(token_mask), ROWS))
    options = {"implementation": implementation, "chunk": chunk}
    got, expected = (update(table, state, of, rule, row_step(0.1, 2), **options) for of in (padded, real))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_picks_below_zero_do_not_exist(implementation):
    rule, table = RULES["adam"], jnp.ones((ROWS, COLUMNS))
    state = {name: jnp.ones_like(array) for name, array in rule.init(ROWS, COLUMNS).items()}
    indices = jnp.asarray([[-1, 3], [ROWS - 1, -ROWS], [3, ROWS]])
    gradient = RowGradient(indices, jnp.ones((3, 2)), jnp.ones((3, COLUMNS)))
    absent = gradient._replace(indices=jnp.where(indices < 0, ROWS, indices))
    got, expected = (
        row_update(table, state, [of], rule, row_step(0.1, 2), implementation=implementation)
        for of in (gradient, absent)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert np.flatnonzero(np.any(got[0] != 1, axis=1)).tolist() == [3, ROWS - 1]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_indices_of_narrow_types_update_the_rows_that_they_name(implementation, dtype):
    rule, rows = RULES["adam"], 300
    table = jnp.ones((rows, COLUMNS))
    state = {name: jnp.ones_like(array) for name, array in rule.init(rows, COLUMNS).items()}
    gradient = RowGradient(jnp.asarray([[3], [100]], dtype), jnp.ones((2, 1)), jnp.ones((2, COLUMNS)))
    new, _ = row_update(table, state, [gradient], rule, row_step(0.1, 2), implementation=implementation)
    assert np.flatnonzero(np.any(new != 1, axis=1)).tolist() == [3, 100]


@every_implementation
def test_rounding_is_reproducible_and_unbiased(implementation):
    rows, rule = 48, RowRule(kind="sgd")
    table = jnp.ones((rows, 32), jnp.bfloat16)
    gradient = RowGradient(jnp.arange(rows)[:, None], jnp.ones((rows, 1)), jnp.ones((rows, 32)))

    # The spacing of bfloat16 below 1 is 2**-8, so a step of 2**-10 rounds down with probability 1/4.
    def run(seed, number):
        return update(
            table,
            {},
            [gradient],
            rule,
            row_step(2.0**-10, number, seed=seed),
            implementation=implementation,
            chunk=None,
        )[0]

    first = run(1, 1)
    assert bits(first) == bits(run(1, 1))
    assert bits(first) != bits(run(2, 1))
    assert bits(first) != bits(run(1, 2))
    lower = np.asarray(first, np.float32) == 1 - 2.0**-8
    assert np.all(lower | (np.asarray(first) == 1))
    assert abs(lower.mean() - 0.25) < 6 * (0.25 * 0.75 / first.size) ** 0.5


def test_bfloat16_is_rounded_to_the_nearest_without_stochastic_rounding():
    table, gradients = draw_exact(0)
    rule = RowRule(kind="sgd", stochastic_rounding=False)
    new, _ = update(table, {}, gradients, rule, row_step(EXACT_LR, 0), implementation=None, chunk=None)
    picks = [tuple(np.asarray(factor, np.float64) for factor in gradient) for gradient in gradients]
    picks = [(indices.astype(int), weights, vectors) for indices, weights, vectors in picks]
    exact, _ = by_hand(np.asarray(table, np.float64), {}, picks, rule, EXACT_LR, 0)
    np.testing.assert_array_equal(new, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["rowwise_adam", "adam"])
def test_update_of_a_large_table_is_in_place(kind):
    rows, columns, tokens, picks = 2**20, 64, 256, 16
    rule = RowRule(kind=kind, state_columns=64)
    arguments = jax.eval_shape(
        lambda: (
            jnp.zeros((rows, columns)),
            rule.init(rows, columns),
            [
                RowGradient(
                    jnp.zeros((tokens, picks), jnp.int32), jnp.zeros((tokens, picks)), jnp.zeros((tokens, columns))
                )
            ],
            row_step(1e-3, 0),
        )
    )

    def run(table, state, gradients, step):
        return row_update(table, state, gradients, rule, step)

    memory = jax.jit(run, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    table, state = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in arguments[:2])
    assert memory.alias_size_in_bytes >= table + state
    assert memory.temp_size_in_bytes < 0.1 * table
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.1 * table


def test_xla_form_never_holds_every_picked_row(equations_of):
    rows, columns, tokens, picks = 2**17, 64, 4096, 32
    arguments = jax.eval_shape(
        lambda: (
            jnp.zeros((rows, columns)),
            [
                RowGradient(
                    jnp.zeros((tokens, picks), jnp.int32), jnp.zeros((tokens, picks)), jnp.zeros((tokens, columns))
                )
            ],
        )
    )

    def run(table, gradients):
        return row_update(table, {}, gradients, RowRule(kind="sgd"), row_step(1e-3, 0), implementation="xla")

    shapes = {shape for equation in equations_of(run, *arguments) for shape in equation.shapes}
    large = {shape for shape in shapes if np.prod(shape) >= tokens * picks * columns / 4}
    assert large == {(rows, columns)}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_eight_bit_indices_and_iterators_of_gradients_are_accepted(as_users_call, implementation):
    factors: Any = np.array([[200, 3]], np.uint8), np.ones((1, 2)), np.ones((1, 1))
    gradient, table = RowGradient(*factors), jnp.zeros((300, 1))
    run = lambda of: row_update(table, {}, of, RULES["sgd"], row_step(1, 0), implementation=implementation)
    assert np.flatnonzero(run([gradient])[0]).tolist() == [3, 200]
    assert np.flatnonzero(run(one for one in [gradient])[0]).tolist() == [3, 200]


def test_arguments_that_do_not_fit_are_refused(as_users_call):
    table = jnp.ones((ROWS, COLUMNS))
    one = RowGradient(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), jnp.ones((2, COLUMNS)))
    nones: list[Any] = [[], one]
    for none in nones:
        with pytest.raises(ValueError, match="needs a list of at least one RowGradient"):
            row_update(table, {}, none, RULES["sgd"], row_step(1.0, 0))
    rate: Any = 0.1
    with pytest.raises(TypeError, match=r"step must come from memjax.row_step\(lr, step\), found float"):
        row_update(table, {}, [one], RULES["sgd"], rate)
    narrow = RowGradient(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="vectors of width 4 cannot update rows of 8"):
        row_update(table, {}, [narrow], RULES["sgd"], row_step(1.0, 0))
    with pytest.raises(ValueError, match="state_columns=256 must divide the table's 8 columns"):
        RowRule().init(ROWS, COLUMNS)


def test_a_rule_from_outside_runs_in_xla_where_kernels_would(monkeypatch):
    class Halved(RowRule):
        def init(self, num_rows, num_columns, dtype=jnp.float32):
            return {}

        def apply(self, rows, state, gradients, step):
            return rows / 2, {}

    gradient = RowGradient(jnp.array([[2]]), jnp.ones((1, 1)), jnp.ones((1, COLUMNS)))
    run = lambda name: row_update(
        jnp.ones((ROWS, COLUMNS)), {}, [gradient], Halved(), row_step(1, 0), implementation=name
    )
    with pytest.raises(NotImplementedError, match="no kernel for Halved"):
        run("triton")
    monkeypatch.setattr(dispatch, "choose", lambda *_: "triton")
    assert run(None)[0].sum(axis=1).tolist() == [COLUMNS * (0.5 if row == 2 else 1) for row in range(ROWS)]


def test_state_has_the_shapes_and_types_of_its_rule():
    def shapes(rule):
        return {name: (array.shape, array.dtype) for name, array in rule.init(16, 8, jnp.bfloat16).items()}

    assert shapes(RowRule(state_columns=2)) == {"second_moment": ((16, 4), jnp.float32)}
    assert shapes(RowRule(kind="rowwise_adagrad", state_columns=8)) == {"second_moment": ((16, 1), jnp.float32)}
    moments = dict.fromkeys(("first_moment", "second_moment"), ((16, 8), jnp.bfloat16))
    assert shapes(RowRule(kind="adam", moment_dtype=jnp.bfloat16)) == moments
    assert shapes(RowRule(kind="sgd")) == {}
