"""Collect the problems of a config, each with the place where the setting was written, and a hint."""

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
"""The place of a problem that is not in a file."""

_SECTIONS_ELSEWHERE = {"moe": "experts"}
"""What sections are called in other programs, and in the names of presets."""


class Problems:
    """The problems of one config, and where each setting was written."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.places: dict[FieldPath, str] = {}
        """Where each setting that is in force was written."""
        self.lines: list[str] = []
        self.flags: list[str] = []
        """Options of the command line that are no settings."""
        self._num_unknown = 0
        self._known = {".".join(path): section_of(annotation) is not None for path, annotation in walk(schema)}

    def add(self, place: str, problem: str) -> None:
        """Takes a problem and where it is."""
        self.lines.append(f"{place}: {problem}")

    def of_arguments(self, problem: str) -> None:
        """Takes a problem of the command line."""
        self.add(_COMMAND_LINE, problem)

    def nearest(self, path: FieldPath) -> str:
        """Where a setting was written, or else the section that it is in."""
        lengths = range(len(path), -1, -1)
        return next((self.places[path[:size]] for size in lengths if path[:size] in self.places), _COMMAND_LINE)

    def unknown(self, path: FieldPath, *, is_section: bool, place: str) -> None:
        """Takes a name that is no setting's."""
        name = ".".join(path)
        if name in self._known:
            self.add(place, f"{name}: write sections as indented lines, not with dots")
            return
        if new_name(name) in self._known:
            self.add(place, f"{name} is now {new_name(name)}")
            return
        self._num_unknown += 1
        # Each hint compares the name with every setting; a file of thousands of unknown names is no misspelt config.
        hint = did_you_mean(self._similar(path, is_section)) if self._num_unknown <= MOST_SHOWN else ""
        self.add(place, f"{shortened(printable(name))}: unknown setting{hint}")

    def invalid(self, item: Any) -> None:
        """Takes a value that does not fit its field, as pydantic describes it."""
        path = tuple(part for part in item["loc"] if isinstance(part, str))
        dotted = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item["loc"]).lstrip(".")
        if item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                # Of the fields in the message, the first that was written is the one to look at.
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
        """The setting that is meant most likely; empty where none is similar.

        The dotted paths are compared as a whole, so that a misspelt section does not lead into another one. A name
        that exists in another section only is looked for there.
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
    """The end of an option that sets a section, which is that of its first setting without a default; else empty."""
    section = section_of(annotation)
    fields = dataclasses.fields(section) if section else ()
    missing = dataclasses.MISSING
    return next((f".{field.name}" for field in fields if field.default is field.default_factory is missing), "")


def close(name: str, names: Sequence[str], *, last: str = "") -> list[str]:
    """The most similar of some names, in a list; the `last` part of a dotted name must be similar too."""

    def similarity(other: str) -> float:
        leaf = other.rpartition(".")[2]
        if last and _ratio(leaf, last) < 0.6:  # a long path in common would hide that the names are different
            return 0.0
        is_near = last and (leaf == last or other.rpartition(".")[0] == name.rpartition(".")[0])
        return _ratio(other, name) + (0.06 if is_near else 0.0)

    found = max(names, key=similarity, default="")
    if not found or similarity(found) < 0.72:
        return []
    # Of sections that have the same setting and are about as similar, the first one.
    leaf, limit = found.rpartition(".")[2], similarity(found) - 0.05
    return [next(name for name in names if name.rpartition(".")[2] == leaf and similarity(name) >= limit)]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other[:200], autojunk=False).ratio()


def did_you_mean(names: Sequence[str]) -> str:
    """The end of a message that proposes some names; empty where there are none."""
    return f"; did you mean {' or '.join(repr(name) for name in names)}?" if names else ""
