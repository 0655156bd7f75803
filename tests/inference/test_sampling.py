"""Tokens are selected and drawn as if the vocabulary were sorted, but without sorting it."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.config.sampling import SamplingConfig
from memjax.inference.sampling import Mode, Rules, allowed, likelihoods, pick

BOTH = Mode(draws=True, top_k=True, top_p=True)
compiled = jax.jit(allowed, static_argnames="mode")
compiled_on = {
    backend: jax.jit(lambda *arguments, mode: allowed(*arguments, mode=mode), static_argnames="mode")
    for backend in ("cpu", "gpu")
}
"""The function as each kind of device would run it."""
compiled_pick = jax.jit(pick, static_argnames="mode")
VOCABULARY = 12


def kept_by_sorting(logits, top_k, top_p):
    """Selects tokens from the likeliest down; the first of equal ones."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: int(top_k)]
    weights = np.exp(np.array([logits[token] for token in order], np.float64))
    kept, total = set(), 0.0
    for token, weight in zip(order, weights / weights.sum(), strict=True):
        if total >= top_p:
            break
        kept.add(token)
        total += weight
    return kept


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.125, 0.5, 1.0, 3.0]), min_size=12, max_size=12),
        min_size=3,
        max_size=3,
    ),
    top_k=st.lists(st.integers(1, VOCABULARY + 3), min_size=3, max_size=3),
    # No cumulative probability comes close to any of these.
    top_p=st.lists(st.sampled_from([0.0137, 0.3211, 0.7013, 0.9717, np.inf]), min_size=3, max_size=3),
)
def test_exactly_the_likeliest_tokens_are_kept_and_of_equal_ones_the_first(backend, rows, top_k, top_p):
    logits, counts, shares = jnp.asarray(rows), jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)
    with mock.patch.object(jax, "default_backend", return_value=backend):
        kept = np.asarray(compiled_on[backend](logits.astype(jnp.float32), counts, shares, mode=BOTH))
    for row, logits_of_row in enumerate(rows):
        expected = kept_by_sorting(logits_of_row, top_k[row], top_p[row])
        assert set(np.flatnonzero(kept[row])) == expected


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_top_k_is_exact_where_logits_are_as_close_as_numbers_can_be(dtype, backend):
    with jax.enable_x64(dtype == "float64"), mock.patch.object(jax, "default_backend", return_value=backend):
        steps = np.random.default_rng(0).permutation(4000)
        logits = jnp.asarray(1 + steps * float(np.finfo(dtype).eps), dtype)[None]
        mode = Mode(draws=True, top_k=True)
        for top_k in (1, 7, 1000, 4000):
            rules = jnp.asarray([top_k], jnp.int32), jnp.asarray([1.0], jnp.float32)
            kept = compiled_on[backend](logits, *rules, mode=mode)
            assert set(steps[np.asarray(kept[0])]) == set(range(4000 - top_k, 4000))


def test_infinities_and_huge_numbers_keep_their_order():
    logits = jnp.asarray([[-jnp.inf, -3e38, -1e-40, 1e-30, 3e38, jnp.inf]], jnp.float32)
    for top_k in range(1, 7):
        kept = compiled(logits, jnp.asarray([top_k]), jnp.asarray([1.0]), mode=Mode(draws=True, top_k=True))
        assert np.flatnonzero(kept[0]).tolist() == list(range(6 - top_k, 6))


def test_the_smallest_temperature_gives_the_likeliest_token():
    logits = jnp.asarray([[1.0, 5.0, 9.0, 3.0]])
    settings = SamplingConfig(temperature=1.3e-38, top_p=1.3e-38)
    rules = Rules.of([(settings, 0)])
    uses, step = jnp.full((1, 4), -1), jnp.zeros(1, jnp.int32)
    assert compiled_pick(logits, uses, rules, step, mode=Mode.of([settings])).tolist() == [2]


@pytest.mark.parametrize("penalty", [0.009, 101.0])
def test_penalties_that_would_overflow_are_refused(penalty):
    with pytest.raises(ValueError, match=f"repetition_penalty={penalty} must be in 0.01..100"):
        SamplingConfig(repetition_penalty=penalty)


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("penalty", [-2.001, 2.001, float("nan")])
def test_penalties_outside_the_range_of_the_interface_are_refused(name, penalty):
    with pytest.raises(ValueError, match=f"{name}={penalty} must be"):
        SamplingConfig(**{name: penalty})


def penalised(logits, uses, sampling, bias):
    """Changes each logit in vLLM's order: bias, repetition, then frequency and presence."""
    found = np.array(logits, np.float64)
    for token, value in bias.items():
        found[token] += value
    for token, times in enumerate(uses):
        if times >= 0:
            penalty = sampling.repetition_penalty
            found[token] = found[token] / penalty if found[token] > 0 else found[token] * penalty
        if times > 0:
            found[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return found


def test_every_row_is_picked_by_its_own_settings():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(11, 50)), jnp.float32)
    uses = jnp.asarray(rng.choice([-1, 0, 1, 2, 7], size=(11, 50), p=[0.4, 0.2, 0.2, 0.1, 0.1]), jnp.int32)
    samplings = [
        SamplingConfig(),
        SamplingConfig(temperature=1.0, seed=3),
        SamplingConfig(temperature=2.0, top_k=3, seed=4),
        SamplingConfig(temperature=1.5, top_p=0.5, seed=5),
        SamplingConfig(repetition_penalty=4.0),
        SamplingConfig(frequency_penalty=1.3),
        SamplingConfig(presence_penalty=-1.7, temperature=1.0, seed=6),
        SamplingConfig(repetition_penalty=0.5, frequency_penalty=-0.4, presence_penalty=2.0),
        SamplingConfig(temperature=1.5, min_p=0.3, seed=7),
        SamplingConfig(),
        SamplingConfig(repetition_penalty=2.0, presence_penalty=0.5),
    ]
    best = np.argsort(-np.asarray(logits), axis=1)
    biases = [{} for _ in samplings]
    biases[9] = {int(best[9, 0]): -100.0, int(best[9, 2]): 1.5}
    biases[10] = {token: float(value) for token, value in enumerate(rng.normal(size=50))}
    step = jnp.arange(11, dtype=jnp.int32)

    def picked(rows):
        chosen, bias = [(samplings[row], row) for row in rows], [biases[row] for row in rows]
        mode = Mode.of([samplings[row] for row in rows], bias)
        rows = np.asarray(rows)
        return compiled_pick(logits[rows], uses[rows], Rules.of(chosen, bias), step[rows], mode=mode).tolist()

    together = picked(range(11))
    assert together == [token for row in range(11) for token in picked([row])]
    assert together[0] == int(np.argmax(logits[0]))
    for row in (4, 5, 7, 9, 10):
        assert together[row] == int(np.argmax(penalised(logits[row], uses[row], samplings[row], biases[row])))


@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [(1.0, 0.2, None, 1.0), (2.0, 0.35, None, 1.0), (1.0, 0.1, 3, 1.0), (1.0, 0.1, None, 0.7), (3.0, 1.0, None, 1.0)],
)
def test_min_p_is_a_share_of_the_largest_probability_at_the_temperature(temperature, min_p, top_k, top_p):
    logits = np.random.default_rng(1).normal(size=20)
    weights = np.exp(logits / temperature)
    weights[weights < min_p * weights.max()] = 0
    kept = kept_by_sorting(np.log(weights, where=weights > 0, out=np.full(20, -np.inf)), top_k or 20, top_p)
    expected = np.array([weight * (token in kept) for token, weight in enumerate(weights)])
    expected /= expected.sum()
    assert 0 < np.count_nonzero(expected) < 20
    sampling, count = SamplingConfig(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p), 2000
    rows, uses = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)), jnp.full((count, 20), -1)
    rules = Rules.of([(sampling, number) for number in range(count)])
    drawn = compiled_pick(rows, uses, rules, jnp.zeros(count, jnp.int32), mode=Mode.of([sampling]))
    counts = np.bincount(drawn, minlength=20)
    assert not counts[expected == 0].any()
    assert (abs(counts - count * expected) <= 4.5 * np.sqrt(count * expected * (1 - expected)) + 1).all()


def test_modes_that_a_request_does_not_need_are_off():
    assert Mode.of([SamplingConfig(min_p=0.5)], [{}]) == Mode()
    assert Mode.of([SamplingConfig(temperature=1.0)]) == Mode(draws=True)
    assert Mode.of([SamplingConfig(temperature=1.0, min_p=0.5)]) == Mode(draws=True, min_p=True)
    assert Mode.of([SamplingConfig()] * 2, [{}, {3: 0.5}]) == Mode(bias=True)


def test_a_vocabulary_is_never_sorted():
    def operations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)

    rules = Rules.of([(SamplingConfig(temperature=1.0, top_k=5, top_p=0.9), 0)] * 4)
    run = lambda logits, uses: compiled_pick(logits, uses, rules, jnp.zeros(4, jnp.int32), mode=BOTH)
    jaxpr = jax.make_jaxpr(run)(jnp.zeros((4, 4096)), jnp.zeros((4, 4096), jnp.int32))
    names = set(operations(jaxpr.jaxpr))
    assert "while" in names or "scan" in names
    assert not {"sort", "top_k"} & names


def test_log_probabilities_are_the_models_own():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)), jnp.float32)
    found = likelihoods(logits, jnp.asarray([4, 0]), 3)
    expected = np.log(np.exp(np.asarray(logits, np.float64)) / np.exp(np.asarray(logits, np.float64)).sum(1)[:, None])
    np.testing.assert_allclose(found.chosen, [expected[0, 4], expected[1, 0]], rtol=1e-5)
    order = np.argsort(-expected, axis=1)[:, :3]
    np.testing.assert_array_equal(found.top_tokens, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, axis=1), rtol=1e-5)
    assert likelihoods(logits, jnp.asarray([4, 0]), 0).top.shape == (2, 0)
