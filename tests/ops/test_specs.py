"""Every implementation of every operation agrees with the reference; with -m gpu, compiled kernels do, too."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from memjax import ops
from memjax.ops import specs


# Each kernel has its own tests, so the slow interpreter can be left out of the quick ones here.
@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.slow), "xla"])
@pytest.mark.parametrize("operation", specs.OPERATIONS)
def test_an_implementation_is_the_definition(implementation, operation):
    assert specs.difference(operation, implementation) < 1e-4


def test_every_operation_has_cases():
    (folder,) = map(pathlib.Path, ops.__path__)
    assert set(specs.OPERATIONS) == {path.parent.name for path in folder.glob("*/reference.py")}
    for operation in specs.OPERATIONS:
        assert specs.specs(operation)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda name, x: x if name == "reference" else 1.25 * x, 0.5625),  # the gradient is 1.25**2 times as large
        (lambda name, x: x**2 if name == "reference" else jax.lax.stop_gradient(x) * x, 0.5),
        (lambda name, x: x if name == "reference" else x * jnp.nan, jnp.inf),
    ],
    ids=["of results", "of gradients", "to NaN"],
)
def test_a_difference_is_found(function, expected, monkeypatch):
    monkeypatch.setattr(specs, "specs", lambda operation: {"one": specs.Case(function, (jnp.float32(2.0),))})
    assert specs.difference("any", "xla") == expected


def test_another_shape_is_not_a_small_difference(monkeypatch):
    function = lambda name, x: x if name == "reference" else x[None]
    monkeypatch.setattr(specs, "specs", lambda operation: {"one": specs.Case(function, (jnp.ones(3),))})
    with pytest.raises(ValueError, match=r"any: xla has shape \(1, 3\), the reference \(3,\)"):
        specs.difference("any", "xla")
