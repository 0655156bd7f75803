"""Every implementation of every operation computes what its definition does; with -m gpu, the compiled kernels."""

import pathlib

import pytest

from memjax import ops
from memjax.ops import specs


# Each kernel has tests of its own, so that here the interpreter, which takes long, is no loss.
@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.slow), "xla"])
@pytest.mark.parametrize("operation", specs.OPERATIONS)
def test_an_implementation_is_the_definition(implementation, operation):
    assert specs.difference(operation, implementation) < 1e-4


def test_every_operation_has_uses():
    (folder,) = map(pathlib.Path, ops.__path__)
    assert set(specs.OPERATIONS) == {path.parent.name for path in folder.glob("*/reference.py")}
    for operation in specs.OPERATIONS:
        assert specs.specs(operation)


def test_a_difference_is_found():
    run = {"two": lambda name: 2.0 if name == "reference" else 2.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "specs", lambda operation: run)
        assert specs.difference("any", "xla") == 0.25
