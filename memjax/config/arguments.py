"""Settings on command lines, such as `--model.dim 64`; the type of the field determines how the text is read."""

import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ruamel.yaml.error import YAMLError

from memjax.config.files import to_tree
from memjax.config.problems import Problems
from memjax.config.schema import FieldPath, field_type, printable, unwrap
from memjax.config.yaml import compose

_FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "1": None, "0": None}
"""Words that may follow a boolean setting, with their values; None for words rejected as values, not as stray."""


class Arguments(NamedTuple):
    """A command line, split into its parts."""

    settings: list[tuple[FieldPath, str]]
    """Paths and unparsed values, in order."""
    stray: list[str]
    """Words that belong to no option."""
    flags: set[str]
    """The bare flags that were given, with underscores."""


def split(words: Sequence[str], flags: Mapping[str, str], problems: Problems) -> Arguments:
    """Splits a command line into settings, flags and other words."""
    schema, found = problems.schema, Arguments([], [], set())
    problems.flags = list(flags)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            found.stray.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        path = tuple(name.replace("-", "_").split("."))
        if path[0] in flags and len(path) == 1:
            found.flags.add(path[0])
            if equals:
                problems.of_arguments(f"--{path[0]} takes no value")
            continue
        annotation = field_type(schema, path)
        negated = (*path[:-1], path[-1].removeprefix("no_"))
        if annotation is None and not equals and field_type(schema, negated) is bool:
            path, annotation, equals, text = negated, bool, "=", "false"
        if not equals and annotation is bool and not (queue and queue[0].lower() in _FLAG_WORDS):
            equals, text = "=", "true"
        if not equals:
            if queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            elif annotation is not None:
                problems.of_arguments(f"--{printable(name)} needs a value{_with_dashes(name, queue, flags, schema)}")
                continue
        if annotation is None:
            problems.unknown(path, is_section=text.startswith("{"), place="command line")
        else:
            found.settings.append((path, text))
    return found


def _with_dashes(name: str, rest: Sequence[str], flags: Mapping[str, str], schema: type) -> str:
    """A hint for values that begin with dashes, if the next word may be one."""
    other = re.split("[.=]", rest[0][2:])[0].replace("-", "_") if rest else ""
    known = (other in flags, *(field_type(schema, (word,)) for word in (other, other.removeprefix("no_"))))
    is_option = not rest or any(known)
    return "" if is_option else f"; one that begins with -- is given as --{printable(name)}=VALUE"


def from_text(text: str, path: FieldPath, problems: Problems) -> Any:
    """Parses the text of a field's value."""
    inner, optional = unwrap(field_type(problems.schema, path))
    # By the field's type: `none` is a valid gate but means null for a number, and a folder may be called 2026.
    if typing.get_origin(inner) is Literal and text in typing.get_args(inner):
        return text
    if optional and text.lower() in ("null", "none"):
        return None
    if inner is str:
        return text
    if inner is bool and _FLAG_WORDS.get(text.lower()) is not None:
        return _FLAG_WORDS[text.lower()]
    if typing.get_origin(inner) is tuple and not text.startswith("["):
        if typing.get_args(inner)[0] is str and not {'"', "'"} & set(text):
            return [item for item in re.split(", *", text) if item]
        text = f"[{text}]"
    try:
        node = compose(text)
    except (YAMLError, RecursionError):
        return text
    return text if node is None else to_tree(node, path, problems, lambda _: "command line")


def take(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Removes an option that is not a setting: returns its values, one per occurrence, and the remaining words.

    An option without a value gives an empty text.
    """
    values, rest, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if name.replace("-", "_") != f"__{option}":
            rest.append(word)
            continue
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else ""
        values.append(value)
    return values, rest
