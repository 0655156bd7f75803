"""Collects the problems of a config, each with the place of the setting, and a hint."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

from memjax.config.renamed import new_name, new_value
from memjax.config.schema import FieldPath, field_type, in_words, printable, section_of, shortened, show, unwrap, walk
from memjax.errors import MOST_SHOWN

_COMMAND_LINE = "command line"
"""The place of problems that are not in a file."""

_SECTIONS_ELSEWHERE = {"moe": "experts"}
"""Names of sections in other programs and in the names of presets."""


class Problems:
    """The problems of one config, and where each setting was written."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.places: dict[FieldPath, str] = {}
        """Where the final value of each setting was written."""
        self.lines: list[str] = []
        self.flags: list[str] = []
        """Options of the command line that are not settings."""
        self._num_unknown = 0
        self._known = {".".join(path): section_of(annotation) is not None for path, annotation in walk(schema)}

    def add(self, place: str, problem: str) -> None:
        """Adds a problem at a place."""
        self.lines.append(f"{place}: {problem}")

    def of_arguments(self, problem: str) -> None:
        """Adds a problem of the command line."""
        self.add(_COMMAND_LINE, problem)

    def nearest(self, path: FieldPath) -> str:
        """Where a setting was written, or else the innermost section around it that was."""
        lengths = range(len(path), -1, -1)
        return next((self.places[path[:size]] for size in lengths if path[:size] in self.places), _COMMAND_LINE)

    def unknown(self, path: FieldPath, *, is_section: bool, place: str) -> None:
        """Adds the problem of an unknown setting."""
        name = ".".join(path)
        if name in self._known:
            self.add(place, f"{name}: write sections as indented lines, not with dots")
            return
        if new_name(name) in self._known:
            self.add(place, f"{name} is now {new_name(name)}")
            return
        self._num_unknown += 1
        # Each hint compares the name with every setting, and a file of thousands of unknown names is not a misspelt
        # config.
        hint = did_you_mean(self._similar(path, is_section)) if self._num_unknown <= MOST_SHOWN else ""
        self.add(place, f"{shortened(printable(name))}: unknown setting{hint}")

    def invalid(self, item: Any) -> None:
        """Adds a value that does not fit its field, as described by pydantic."""
        path = tuple(part for part in item["loc"] if isinstance(part, str))
        dotted = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item["loc"]).lstrip(".")
        if item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                # The first field in the message that was set explicitly is the likely culprit.
                named = [(*path, *name.split(".")) for name in re.findall(r"([a-z_][\w.]*)=", line)]
                place = next((self.places[field] for field in named if field in self.places), self.nearest(path))
                joint = "" if not dotted else "." if re.match(r"[a-z_][\w.]*=", line) else ": "
                self.add(place, f"{dotted}{joint}{printable(line)}")
            return
        annotation = field_type(self.schema, path, in_items=True)
        if item["type"] == "missing":
            is_option = self.nearest(path) == _COMMAND_LINE and "[" not in dotted
            needed = (
                f"set --{dotted}{_first_required(annotation)}" if is_option else f"it must be {in_words(annotation)}"
            )
            problem = f"{dotted} is missing: {needed}"
        elif annotation is None:
            problem = f"{dotted or 'config'}: {item['msg']}"
        else:
            inner, _ = unwrap(annotation)
            expected = annotation if path and item["loc"][-1] == path[-1] else typing.get_args(inner)[0]
            options = [option for option in typing.get_args(inner) if isinstance(option, str)]
            found = new_value(dotted, item["input"])
            hint = f"; it is now {found!r}" if found else did_you_mean(close(str(item["input"])[:100], options))
            problem = f"{dotted}={shortened(show(item['input']))} must be {in_words(expected)}{hint}"
        self.add(self.nearest(path), problem)

    def _similar(self, path: FieldPath, is_section: bool) -> list[str]:
        """The setting most likely meant, in a list; empty if none is similar.

        Dotted paths are compared as a whole, so that a misspelt section does not suggest another one. A name that
        exists only in another section is found there.
        """
        path = tuple(_SECTIONS_ELSEWHERE.get(part, part) for part in path)
        same_kind = [name for name, section in self._known.items() if section == is_section] + self.flags
        if found := close(".".join(path), same_kind, last=path[-1]):
            return found
        same_name = [name for name in same_kind if name.rpartition(".")[2] == path[-1]]
        if same_name:
            return sorted(same_name, key=lambda name: name.partition(".")[0] != path[0])[:1]
        if found := close(".".join(path), [*self._known, *self.flags]):
            return found
        leaves = {name.rpartition(".")[2]: name for name in reversed(self._known)}
        return [leaves[leaf] for leaf in close(path[-1], list(leaves))]


def _first_required(annotation: Any) -> str:
    """The suffix that makes a section's option name its first required setting; empty if there is none."""
    section = section_of(annotation)
    fields = dataclasses.fields(section) if section else ()
    missing = dataclasses.MISSING
    return next((f".{field.name}" for field in fields if field.default is field.default_factory is missing), "")


def close(name: str, names: Sequence[str], *, last: str = "") -> list[str]:
    """The most similar of several names, in a list; the `last` part of a dotted name must also be similar."""

    def similarity(other: str) -> float:
        leaf = other.rpartition(".")[2]
        if last and _ratio(leaf, last) < 0.6:  # a long common path would hide that the names differ
            return 0.0
        is_near = last and (leaf == last or other.rpartition(".")[0] == name.rpartition(".")[0])
        return _ratio(other, name) + (0.06 if is_near else 0.0)

    found = max(names, key=similarity, default="")
    if not found or similarity(found) < 0.72:
        return []
    # Among sections with the same setting and about the same similarity, take the first.
    leaf, limit = found.rpartition(".")[2], similarity(found) - 0.05
    return [next(name for name in names if name.rpartition(".")[2] == leaf and similarity(name) >= limit)]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other[:200], autojunk=False).ratio()


def did_you_mean(names: Sequence[str]) -> str:
    """The end of a message that suggests names; empty if there are none."""
    return f"; did you mean {' or '.join(repr(name) for name in names)}?" if names else ""
