"""Checks of settings, for the `__post_init__` of configs and for the classes that take the same values as arguments.

A check is a list of problems in words, each beginning with `field=value`; None stands where all is well.
"""

import functools
import math
import numbers
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from memjax.config.renamed import new_value
from memjax.io.paths import local_path, path_or_address


def refuse(problems: list[str | None]) -> None:
    """Raises one ValueError with every problem on a line of its own; does nothing when there is none."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


def positive(**fields: int | float | None) -> list[str | None]:
    """Fields must be above 0, or null."""
    return [f"{name}={value} must be positive" for name, value in fields.items() if value is not None and not value > 0]


def not_empty(**fields: str | None) -> list[str | None]:
    """Texts must not be empty; they may be null."""
    return [f"{name}={value!r} must not be empty" for name, value in fields.items() if value is not None and not value]


def not_negative(**fields: int | float | None) -> list[str | None]:
    """Fields must be 0 or above, or null."""
    return [
        f"{name}={value} must not be negative" for name, value in fields.items() if value is not None and not value >= 0
    ]


def whole(**fields: Any) -> list[str | None]:
    """Fields must be whole numbers, or null."""
    return [
        f"{name}={value!r} must be a whole number"
        for name, value in fields.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral))
    ]


def counts(**fields: Any) -> list[str | None]:
    """Fields must be whole numbers above 0, or null."""
    return whole(**fields) or positive(**fields)


def one_of(known: Sequence[str], **fields: Any) -> list[str | None]:
    """Fields must be one of the known words."""
    return [
        f"{name}={value!r} is unknown; known: {', '.join(known)}"
        for name, value in fields.items()
        if not (isinstance(value, str) and value in known)
    ]


def typed(config: Any, section: str | None = None) -> None:
    """Refuses fields of a config's dataclass whose values are not of their types: what the reader of files checks too.

    Fields of classes, which check themselves, and of types without a rule here are left out.

    Args:
        config: the dataclass.
        section: where its fields are in a run's config, so that values that were renamed are recognised.

    Raises:
        ValueError: a word is unknown, or a number or flag is none.
    """
    problems: list[str | None] = []
    for name, kind in _types(type(config)).items():
        value, kinds = getattr(config, name), [one for one in _union(kind) if one is not type(None)]
        if value is None and len(kinds) < len(_union(kind)):
            continue
        found = [rule(**{name: value}) for rule in map(_rule, kinds) if rule is not None]
        if len(found) == len(kinds) and all(map(any, found)):
            now = section and new_value(f"{section}.{name}", value)
            problems += [f"{problem}; it is now {now!r}" if problem and now else problem for problem in found[0]]
    refuse(problems)


def _union(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _rule(kind: Any) -> Callable[..., list[str | None]] | None:
    """The check of values of a type."""
    if get_origin(kind) is Literal:
        return functools.partial(one_of, get_args(kind))
    if kind == tuple[int, ...]:
        return _whole_numbers
    return {bool: _flags, int: whole, float: _numbers}.get(kind)


def _flags(**fields: Any) -> list[str | None]:
    return [f"{name}={value!r} must be true or false" for name, value in fields.items() if not isinstance(value, bool)]


def _numbers(**fields: Any) -> list[str | None]:
    return [
        f"{name}={value!r} must be a finite number"
        for name, value in fields.items()
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value)
    ]


def _whole_numbers(**fields: Any) -> list[str | None]:
    return [
        f"{name}={value!r} must be a tuple of whole numbers"
        for name, value in fields.items()
        if not isinstance(value, tuple) or any(whole(item=item) for item in value)
    ]


@functools.cache
def _types(owner: type, include_extras: bool = False) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=include_extras)


def ranges(config: Any) -> list[str | None]:
    """Problems with values outside of the ranges that the types of a config's fields name (`memjax.config.section`)."""
    return [
        problem
        for name, kind in _types(type(config), include_extras=True).items()
        for one in _union(kind)
        for check in getattr(one, "__metadata__", ())
        for problem in check(**{name: getattr(config, name)})
    ]


def share(**fields: float) -> list[str | None]:
    """Fields must be in 0..1."""
    return [f"{name}={value} must be in 0..1" for name, value in fields.items() if not 0 <= value <= 1]


def below_one(**fields: float | None) -> list[str | None]:
    """Fields must be in 0..1 and below 1, or null."""
    return [
        f"{name}={value} must be in 0..1 and below 1"
        for name, value in fields.items()
        if value is not None and not 0 <= value < 1
    ]


def local_paths(section: Any, *names: str, remote: bool = False) -> list[str | None]:
    """Fields must hold paths of this machine, alone or in a tuple, or null; their `~` is expanded in the section. With
    remote, addresses are right, too; whether this machine can read them is not asked, since a config is also loaded
    where nothing of them is needed.
    """
    problems: list[str | None] = []

    def expanded(text: str, name: str) -> str:
        try:
            path = (path_or_address if remote else local_path)(text, name)
        except ValueError as error:
            problems.append(str(error))
            return text
        # Otherwise as it was written, so that messages and recorded settings show it so.
        return str(path) if text.startswith("~") else text

    for name in names:
        value = getattr(section, name)
        if isinstance(value, str):
            object.__setattr__(section, name, expanded(value, name))
        elif value is not None:
            object.__setattr__(section, name, tuple(expanded(text, name) for text in value))
    return problems


def block_numbers(layers: tuple[int, ...]) -> Iterator[str]:
    """Why a list of blocks cannot be."""
    if not layers:
        yield "layers=[] must name at least one block; for none, set the section to null"
    if list(layers) != sorted(set(layers)):
        yield f"layers={list(layers)} must be in rising order, each block once"
