"""What an operation computes with, read off its jaxpr."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import pytest


class Equation(NamedTuple):
    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the outputs."""


def _equations(jaxpr: Any) -> Iterator[Equation]:
    for equation in jaxpr.eqns:
        yield Equation(equation.primitive.name, tuple(var.aval.shape for var in equation.outvars))
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.fixture(scope="session")
def equations_of() -> Callable[..., list[Equation]]:
    """equations_of(function, *arguments): every equation of the jaxpr, those of inner jaxprs included."""
    return lambda function, *arguments: list(_equations(jax.make_jaxpr(function)(*arguments).jaxpr))
