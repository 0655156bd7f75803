"""Checks of settings, for the `__post_init__` of configs and for classes that take the same values as arguments.

A check returns a list of problems, each beginning with `field=value`. Null passes all checks except those of types.
"""

import dataclasses
import functools
import math
import numbers
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from memjax.config.renamed import new_value
from memjax.config.schema import field_types
from memjax.io.paths import local_path, path_or_address


def refuse(problems: Sequence[str]) -> None:
    """Raises a ValueError with one problem per line, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


def several(value: Any) -> Any:
    """Wraps a single text or path in a list, so that its letters are not taken for items."""
    return [value] if isinstance(value, str | os.PathLike) else value


Check = Callable[..., list[str]]
"""Takes fields by name, and returns the problems with their values."""


def _check(is_right: Callable[[Any], bool], rule: str, *, quoted: bool = False, or_null: bool = True) -> Check:
    def check(**fields: Any) -> list[str]:
        return [
            f"{name}={value!r} {rule}" if quoted else f"{name}={value} {rule}"
            for name, value in fields.items()
            if not ((or_null and value is None) or _holds(is_right, value))
        ]

    return check


def _holds(is_right: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_right(value)
    except (TypeError, OverflowError):  # not comparable, such as a text, or out of range
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _fits_float32(value: Any) -> bool:
    return value == 0 or 1.2e-38 <= abs(value) <= 3.4e38


def _are_whole(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_whole, value))


positive = _check(lambda value: value > 0, "must be positive")
not_negative = _check(lambda value: value >= 0, "must not be negative")
share = _check(lambda value: 0 <= value <= 1, "must be in 0..1")
below_one = _check(lambda value: 0 <= value < 1, "must be in 0..1 and below 1")
not_empty = _check(bool, "must not be empty", quoted=True)
whole = _check(_is_whole, "must be a whole number", quoted=True)
finite = _check(_is_finite, "must be a finite number", quoted=True)


def _both(one: Check, other: Check) -> Check:
    return lambda **fields: one(**fields) or other(**fields)


_of_type = functools.partial(_check, quoted=True, or_null=False)
whole_number = _both(
    _of_type(_is_whole, "must be a whole number"),
    _check(lambda value: -(1 << 63) <= value < 1 << 63, "must be in -2**63..2**63-1"),
)
# A number that float32 rounds to zero or infinity would turn into NaN during a run.
_TYPES: dict[Any, Check] = {
    bool: _of_type(lambda value: isinstance(value, bool), "must be true or false"),
    int: whole_number,
    float: _both(
        _of_type(_is_finite, "must be a finite number"),
        _check(_fits_float32, "must be a number of float32: 0, or from 1.2e-38 to 3.4e38"),
    ),
    tuple[int, ...]: _of_type(_are_whole, "must be a tuple of whole numbers"),
}


def is_count(text: str) -> bool:
    """Whether a text is a decimal whole number below 2**63; `int` raises for thousands of digits."""
    digits = text.lstrip("0")
    return text.isascii() and text.isdecimal() and len(digits) < 20 and int(digits or 0) < 1 << 63


def counts(**fields: Any) -> list[str]:
    """Fields must be whole numbers above 0."""
    return whole_number(**fields) or positive(**fields)


def one_of(known: Sequence[str], **fields: Any) -> list[str]:
    """Fields must be one of the known words."""
    return [
        f"{name}={value!r} is unknown; known: {', '.join(known)}"
        for name, value in fields.items()
        if not (isinstance(value, str) and value in known)
    ]


def typed(config: Any, section: str | None = None) -> None:
    """Raises ValueError unless every field of a config holds a value of its type, as parsing a file does.

    Nested sections check their own fields; types without a rule here are not checked. `section` is the config's path in
    a run's config, to recognise renamed values.
    """
    problems: list[str] = []
    for name, kind in field_types(type(config)).items():
        value, kinds = getattr(config, name), [one for one in _union(kind) if one is not type(None)]
        if value is None and len(kinds) < len(_union(kind)):
            continue
        if int in kinds and float in kinds:
            kinds.remove(float if _is_whole(value) else int)
        found = [rule(**{name: value}) for rule in map(_rule, kinds) if rule is not None]
        if len(found) == len(kinds) and all(found):
            now = section and new_value(f"{section}.{name}", value)
            problems += [f"{problem}; it is now {now!r}" if now else problem for problem in found[0]]
    refuse(problems)


def _union(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _rule(kind: Any) -> Check | None:
    """The check for values of a type."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        # A dict, for example, would pass as a section without fields, and the model would lack its memory.
        return _check(lambda value: isinstance(value, kind), f"must be of class {kind.__name__}", quoted=True)
    item: Any = get_args(kind)[0] if get_origin(kind) is tuple else None
    if dataclasses.is_dataclass(item) and isinstance(item, type):
        are_all = lambda values: isinstance(values, tuple | list) and all(isinstance(value, item) for value in values)
        return _check(are_all, f"must be a tuple of {item.__name__}", quoted=True)
    return functools.partial(one_of, get_args(kind)) if get_origin(kind) is Literal else _TYPES.get(kind)


def ranges(config: Any) -> list[str]:
    """Problems with values outside the ranges named by the types of a config's fields (`memjax.config.section`)."""
    return [
        problem
        for name, kind in field_types(type(config), include_extras=True).items()
        for one in _union(kind)
        for check in getattr(one, "__metadata__", ())
        for problem in check(**{name: getattr(config, name)})
    ]


def _check_paths(read: Callable[[str, str], object]) -> Check:
    def check(**fields: Any) -> list[str]:
        problems: list[str] = []
        for name, value in fields.items():
            for text in (value,) if isinstance(value, str) else value or ():
                try:
                    read(text, name)
                except ValueError as error:
                    problems.append(str(error))
        return problems

    return check


local = _check_paths(local_path)
"""Fields must hold local paths, alone or in a tuple."""
local_or_remote = _check_paths(path_or_address)
"""Fields must hold local paths or addresses; whether this machine can read an address is not checked, since a config is
also loaded where it is not needed.
"""


def plain_values(config: Any) -> None:
    """Replaces numbers of NumPy with Python's, and paths with texts: JSON takes no others."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = tuple(map(_plain, value)) if type(value) is tuple else _plain(value)
        object.__setattr__(config, field.name, plain)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_numpy = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_numpy else value


def expand_home(config: Any) -> None:
    """Expands `~` in fields whose types mark them as paths."""
    expanded = lambda text: os.path.expanduser(text) if text.startswith("~") else text
    for name, kind in field_types(type(config), include_extras=True).items():
        checks = [check for one in _union(kind) for check in getattr(one, "__metadata__", ())]
        value = getattr(config, name)
        if value and (local in checks or local_or_remote in checks):
            object.__setattr__(config, name, expanded(value) if isinstance(value, str) else tuple(map(expanded, value)))


def block_numbers(layers: tuple[int, ...]) -> Iterator[str]:
    """Problems with a list of blocks."""
    if not layers:
        yield "layers=[] must name at least one block; for none, set the section to null"
    if list(layers) != sorted(set(layers)):
        yield f"layers={list(layers)} must be in rising order, each block once"
