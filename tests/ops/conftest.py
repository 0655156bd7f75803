"""Inspects operations through their jaxprs, and decides where tests of Triton kernels run."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import pytest

from memjax.ops import dispatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks Triton cases `gpu` if they run on a GPU, and skips them if they cannot run at all."""
    reason = dispatch.why_not("triton")
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            if not any(str(value).startswith("triton") for value in item.callspec.params.values()):
                continue
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
            elif jax.default_backend() == "gpu":
                item.add_marker(pytest.mark.gpu)


class Equation(NamedTuple):
    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the outputs."""


def _equations(jaxpr: Any) -> Iterator[Equation]:
    for equation in jaxpr.eqns:
        yield Equation(equation.primitive.name, tuple(var.aval.shape for var in equation.outvars))
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.fixture(scope="session")
def equations_of() -> Callable[..., list[Equation]]:
    """equations_of(function, *arguments): every equation of the jaxpr, including inner jaxprs."""
    return lambda function, *arguments: list(_equations(jax.make_jaxpr(function)(*arguments).jaxpr))
