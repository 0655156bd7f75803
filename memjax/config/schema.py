"""Introspection of schemas (frozen dataclasses of settings and sections): fields, types, descriptions."""

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

FieldPath = tuple[str, ...]
"""The path of a field: the names of its sections, then its own."""


@functools.cache
def field_types(section: type, include_extras: bool = False) -> dict[str, Any]:
    """The type of each field of a section; include_extras keeps the annotated ranges."""
    hints = typing.get_type_hints(section, include_extras=include_extras)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def unwrap(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), other types as (type, False)."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        arguments = typing.get_args(annotation)
        members = [member for member in arguments if member is not types.NoneType]
        return functools.reduce(lambda left, right: left | right, members), types.NoneType in arguments
    return annotation, False


def section_of(annotation: Any) -> type | None:
    """The section that a field holds, even if it may be null; None for a setting."""
    inner, _ = unwrap(annotation)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def item_section_of(annotation: Any) -> type | None:
    """The section type of a list's items; None for lists of settings and for other types."""
    inner, _ = unwrap(annotation)
    items = typing.get_args(inner)
    return section_of(items[0]) if items and typing.get_origin(inner) is tuple else None


def walk(section: type, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yields every field of a section and of nested sections, with its type."""
    for name, annotation in field_types(section).items():
        yield (*path, name), annotation
        if deeper := section_of(annotation):
            yield from walk(deeper, (*path, name))


def field_type(section: type, path: FieldPath, *, in_items: bool = False) -> Any:
    """The type of a field; in_items also finds fields of list items. None if there is no such field."""
    annotation: Any = section
    for name in path:
        inner = section_of(annotation) or (item_section_of(annotation) if in_items else None)
        annotation = field_types(inner).get(name) if inner else None
    return annotation


def show(value: Any) -> str:
    """A value as YAML on one line."""
    if hasattr(value, "tolist"):  # a number or an array of NumPy or JAX
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(inner) for inner in value) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes escaped, so that it cannot control a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shortened(text: str) -> str:
    """The text, truncated if it is too long for a message."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


PLAIN_TYPES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "INT"),
    float: ("a number", "NUMBER"),
    int | float: ("a whole number, or a fraction such as 0.05", "INT|SHARE"),
    bool: ("true or false", "BOOL"),
    str: ("text, in quotes if it looks like a number", "TEXT"),
}
"""Types of settings, in words and as placeholders in the help."""


def in_words(annotation: Any) -> str:
    """Describes a field's type, for messages."""
    inner, optional = unwrap(annotation)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        text = f"one of {', '.join(show(option) for option in arguments)}"
    elif typing.get_origin(inner) is tuple:
        text = f"a list, each item {in_words(arguments[0])}"
    elif section_of(inner):
        text = "a section, with its settings on indented lines"
    else:
        text = PLAIN_TYPES.get(inner, (str(inner), ""))[0]
    return f"{text}, or null" if optional else text
