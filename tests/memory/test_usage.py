import jax.numpy as jnp
import numpy as np
import pytest

from memjax.memory.usage import count_reads, statistics


def test_every_pick_counts_once_and_picks_out_of_range_do_not():
    indices = jnp.asarray([[[0, 2], [2, 2]], [[4, 5], [1000, 3]]])
    np.testing.assert_array_equal(count_reads(jnp.asarray([10, 0, 0, 0, 0]), indices), [11, 0, 3, 1, 1])


@pytest.mark.parametrize(
    ("reads", "used", "effective", "top1"),
    [
        ([5, 5, 5, 5], 1, 1, 0.25),
        ([0, 7, 0, 0], 0.25, 0.25, 1),
        ([3, 3, 0, 0], 0.5, 0.5, 0.5),
        ([0, 0, 0, 0], 0, 0, 0),
    ],
)
def test_statistics_of_known_reads(reads, used, effective, top1):
    np.testing.assert_allclose(statistics(jnp.asarray(reads)), [used, 1 - used, effective, top1], rtol=1e-6, atol=1e-7)


def test_effective_fraction_is_the_exponential_of_the_entropy():
    reads = np.random.default_rng(0).integers(0, 50, size=40)
    share = [read / reads.sum() for read in reads if read]
    expected = np.exp(-sum(p * np.log(p) for p in share)) / 40
    np.testing.assert_allclose(statistics(jnp.asarray(reads)).effective_fraction, expected, rtol=1e-5)
