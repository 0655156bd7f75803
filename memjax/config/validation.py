"""Validates a tree of settings into a config, and reports all problems together."""

import functools
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import pydantic

from memjax.config import schema
from memjax.config.arguments import from_text
from memjax.config.files import Tree, merge
from memjax.config.problems import Problems, close, did_you_mean
from memjax.errors import ConfigError


def validate(tree: Tree, settings: Sequence[tuple[schema.FieldPath, str]], problems: Problems) -> Any:
    """The config of a tree, overridden by command-line settings.

    Raises:
        ConfigError: lists all problems of files, command line and values.
    """
    # In order, because `--model.memory null --model.memory.num_keys 8` starts from the defaults again.
    for path, text in settings:
        problems.places[path] = "command line"
        value = from_text(text, path, problems)
        tree = merge(tree, functools.reduce(lambda inner, part: {part: inner}, reversed(path), value))
    _refuse_unknown(problems.schema, tree, (), problems)
    tree = _without_undecodable(tree, (), problems)
    config = None
    try:
        # From JSON, pydantic in strict mode still converts lists to tuples and 1 to 1.0.
        config = pydantic.TypeAdapter(problems.schema).validate_json(json.dumps(tree), strict=True)
    except pydantic.ValidationError as error:
        for item in error.errors(include_url=False):
            problems.invalid(item)
    if problems.lines:
        raise ConfigError(problems.lines)
    return config


def _refuse_unknown(section: type, tree: Tree, path: schema.FieldPath, problems: Problems) -> None:
    annotations = schema.field_types(section)
    for name, value in tree.items():
        here, annotation = (*path, name), annotations.get(name)
        if annotation is None:
            problems.unknown(here, is_section=isinstance(value, dict), place=problems.places[here])
        elif isinstance(value, dict) and (deeper := schema.section_of(annotation)):
            _refuse_unknown(deeper, value, here, problems)
        elif isinstance(value, list) and (item := schema.item_section_of(annotation)):
            _refuse_unknown_in_items(item, value, here, problems)


def _refuse_unknown_in_items(section: type, items: list[Any], path: schema.FieldPath, problems: Problems) -> None:
    """Reports unknown settings of list items, which have no nested sections."""
    known = list(schema.field_types(section))
    for number, item in enumerate(items):
        for name in item if isinstance(item, dict) else ():
            if name not in known:
                hint = did_you_mean(close(name, known)) or f"; known: {', '.join(known)}"
                where = f"{'.'.join(path)}[{number}].{schema.printable(name)}"
                problems.add(problems.nearest((*path, name)), f"{where}: unknown setting{hint}")


def _without_undecodable(value: Any, path: schema.FieldPath, problems: Problems) -> Any:
    """The tree without text that UTF-8 cannot encode (lone surrogates, undecodable bytes of the command line)."""
    if isinstance(value, dict):
        return {
            name: _without_undecodable(inner, (*path, name), problems)
            for name, inner in value.items()
            if _is_encodable(name)  # otherwise it is an unknown setting, already reported
        }
    if isinstance(value, list):
        return [_without_undecodable(inner, path, problems) for inner in value]
    if not isinstance(value, str) or _is_encodable(value):
        return value
    way_out = ""
    if sys.getfilesystemencoding() != "utf-8":
        way_out = f"; this locale is {sys.getfilesystemencoding()}: set PYTHONUTF8=1 for other characters"
    what = f"{'.'.join(path)}='{schema.shortened(schema.printable(value))}'"
    problems.add(problems.nearest(path), f"{what} is not text in UTF-8{way_out}")
    return None if schema.unwrap(schema.field_type(problems.schema, path))[1] else ""


def _is_encodable(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)
