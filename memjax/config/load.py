"""Configs from YAML files and command lines: one strict validation, every problem at once, each with its place.

A schema is a frozen dataclass, see memjax.config.run. Nothing here imports JAX, so a wrong config is refused at once.

Written by hand, since no library reads these schemas: tyro makes commands of sections that may be null, jsonargparse
fails on dataclasses with slots, pydantic-settings takes no plain dataclasses apart, and none names every problem at
once.
"""

import dataclasses
import difflib
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar

import pydantic
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from memjax.config import presets
from memjax.config.help import Positional, help_text, section_help
from memjax.config.renamed import new_name, new_value, upgraded
from memjax.config.schema import (
    FieldPath,
    field_type,
    field_types,
    in_words,
    item_section_of,
    printable,
    section_of,
    shortened,
    show,
    unwrap,
    walk,
)
from memjax.config.yaml import compose, dump, scalar, why_invalid
from memjax.errors import ConfigError
from memjax.io.console import output
from memjax.io.paths import local_path, readable_path

T = TypeVar("T")
_NO_FLAGS: Mapping[str, str] = types.MappingProxyType({})


CONFIG_FILE = Positional(
    name="CONFIG.yaml",
    help=(
        "Settings of the run: a YAML file, the name of a preset (`python -m memjax presets` lists them), or the folder "
        "of a run, which continues with its own. Without it, the defaults."
    ),
    required=False,
    is_config=True,
)
RUN_FOLDER = Positional(name="RUN", help="The folder of a run.")
READ_RUN = Positional(name="RUN", help="The folder of a run, or its address (gs://, s3://, hf://, http).", is_read=True)

_WRITTEN_BY_RUNS = ("checkpoints", "metrics.jsonl")
"""What lies beside a config.yaml that a run has written, perhaps one of an earlier version."""

COMPLETE = "--complete"
"""As the only argument of a command: print what a shell may offer."""

SHOWN_PROBLEMS = 40
"""The most problems that are listed: a file that is no config at all has thousands."""

DEEPEST = 32
"""The most levels of sections and lists in a config; the schema has four."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parsed(Generic[T]):
    """What a command line asked for."""

    config: T
    """The validated settings."""
    positional: str | None
    """The positional argument as given, the first where there are several."""
    positionals: tuple[str, ...]
    """All of them."""
    flags: frozenset[str]
    """The bare flags that were given, with underscores."""


def load(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The config of a YAML file (and of the file it `extends`) with overrides such as `--model.dim 64` on top.

    The path may also be the name of a preset or the folder of a run.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    sources = _Sources(schema)
    tree = sources.config(path) if path else {}
    settings, stray, _ = sources.arguments(overrides, _NO_FLAGS)
    sources.problems += [
        f"command line: {shortened(repr(word))} is not a setting; write --section.key value" for word in stray
    ]
    return sources.validate(tree, settings)


def parse(
    schema: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    positional: Positional | None = CONFIG_FILE,
    flags: Mapping[str, str] = _NO_FLAGS,
    examples: Sequence[str] = (),
) -> Parsed[T]:
    """The settings and other arguments of a command line; ends the process on --help (0) and on problems (2).

    Args:
        schema: The dataclass whose fields the options name.
        argv: The arguments, without the program's name; None takes those of the process.
        prog: The command, as help and errors call it.
        description: What the command does.
        positional: The argument without a name; None where there is none.
        flags: Options without a value: name (with underscores) and help.
        examples: Command lines for the help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == [COMPLETE]:
        output("\n".join(_completions(schema, positional, flags)))
        sys.exit(0)
    if asked := {"-h", "--help"}.intersection(argv):
        topic = next(iter(argv[min(map(argv.index, asked)) + 1 :]), "-")
        if topic.startswith("-"):
            output(help_text(schema, prog, description, positional, flags, examples))
            sys.exit(0)
        text = section_help(schema, topic.replace("-", "_"))
        if text is None:
            names = sorted({".".join(path) for path, _ in walk(schema)})
            sections = [name for name, annotation in field_types(schema).items() if section_of(annotation)]
            hint = _did_you_mean(_close(topic, names)) or (f"; sections: {', '.join(sections)}" if sections else "")
            _end(prog, [f"--help {printable(topic)}: there is no such section or setting{hint}"])
        output(str(text))
        sys.exit(0)
    sources = _Sources(schema)
    settings, stray, given = sources.arguments(argv, flags)
    allowed = 0 if positional is None else len(stray) if positional.repeats else 1
    positionals, stray = sources.paths(stray[:allowed], positional), stray[allowed:]
    first = positionals[0] if positionals else None
    tree = sources.config(Path(first)) if first and positional and positional.is_config else {}
    sources.problems += [f"command line: {shortened(repr(word))} is one argument too many" for word in stray]
    if positional and positional.required and first is None:
        sources.problems.append(f"command line: {positional.name} is missing: {positional.help}")
    try:
        config = sources.validate(tree, settings)
    except ConfigError as error:
        _end(prog, error.problems)
    return Parsed(config=config, positional=first, positionals=positionals, flags=frozenset(given))


def _completions(schema: type, positional: Positional | None, flags: Mapping[str, str]) -> list[str]:
    """What a shell may offer for the next word."""
    settings = [f"--{'.'.join(path)}" for path, annotation in walk(schema) if section_of(annotation) is None]
    configs = presets.names() if positional and positional.is_config else []
    return [*configs, *settings, *(f"--{name}" for name in flags), "--help"]


def _end(prog: str, problems: Sequence[str]) -> NoReturn:
    count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    lines = [f"{prog}: {count}", *(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS:,} more")
    print("\n".join([*lines, "--help lists every setting."]), file=sys.stderr)
    sys.exit(2)


def take(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The values of an option that is no setting, as often as it is given, and the other words of a command line.

    An option without a value has the empty one.
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


def to_yaml(config: Any) -> str:
    """The whole config as YAML from which `load` makes an equal one."""
    return dump(dataclasses.asdict(config))


def differences(old: Any, new: Any, _prefix: str = "") -> list[str]:
    """The fields in which two configs of one schema differ, such as `optim.lr: 0.006 -> 0.001`."""
    lines: list[str] = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            lines += differences(before, after, f"{_prefix}{field.name}.")
        elif before != after:
            lines.append(f"{_prefix}{field.name}: {show(before)} -> {show(after)}")
    return lines


class _Sources:
    """What files and command line say, where they say it, and what is wrong with it."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.places: dict[FieldPath, str] = {}
        self.problems: list[str] = []
        self.options: list[str] = []
        self.unknown = 0
        self.known = {".".join(path): section_of(annotation) is not None for path, annotation in walk(schema)}

    def paths(self, words: Sequence[str], positional: Positional | None) -> tuple[str, ...]:
        """Positional arguments, each with its `~` expanded; what is no path of this machine is left out."""
        found = []
        for word in words:
            try:
                check = readable_path if positional and positional.is_read else local_path
                found.append(str(check(word, positional.name if positional else "")))
            except ValueError as error:
                self.problems.append(f"command line: {error}")
        return tuple(found)

    def config(self, path: Path) -> dict[str, Any]:
        """The tree of a config's file, or of a run's folder, whatever the place that the run began in."""
        try:
            path = local_path(str(path), "config")
        except ValueError as error:
            self.problems.append(f"command line: {error}")
            return {}
        if not path.is_dir() or (not (path / "config.yaml").exists() and presets.find(path)):
            return self.read(path if path.is_file() else presets.find(path) or path, "command line")
        file = path / "config.yaml"
        if not file.exists():
            is_part = path.name == "checkpoints" and (path.parent / "config.yaml").exists()
            self.problems.append(
                f"command line: {path} is a folder without a config.yaml, so it is not that of a run that has made a "
                f"step; {f'name {path.parent}' if is_part else f'name a YAML file, and --run.dir {path} to run there'}"
            )
            return {}
        return _merge(self.read(file, "command line"), {"run": {"dir": str(path)}})

    def read(self, path: Path, asked_at: str, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The tree of a file merged over that of the file it extends."""
        if path.resolve() in [link.resolve() for link in chain]:
            circle = " -> ".join(str(link) for link in (*chain, path))
            self.problems.append(f"{asked_at}: extends goes round in a circle: {circle}")
            return {}
        self.places.setdefault((), str(path))
        try:
            node = compose(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = _did_you_mean(_close(str(path), [str(other) for other in path.parent.glob("*.yaml")]))
            if not hint and "=" not in str(path):
                hint = _did_you_mean(_close(path.stem, presets.names()))
            if not hint and "=" in str(path):
                hint = f"; for a setting write --{path}"
            self.problems.append(f"{asked_at}: {printable(str(path))} does not exist{hint}")
            return {}
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.problems.append(f"{path}:{line}: not valid YAML: {why_invalid(error)}")
            return {}
        except IsADirectoryError:
            self.problems.append(f"{asked_at}: {path} is a folder; name a YAML file")
            return {}
        except UnicodeDecodeError:
            self.problems.append(f"{asked_at}: {path} is not UTF-8 text")
            return {}
        except RecursionError:
            self.problems.append(f"{path}: is nested more than {DEEPEST} levels deep")
            return {}
        except OSError as error:
            self.problems.append(f"{asked_at}: {path} cannot be read: {error.strerror or error}")
            return {}
        except (ValueError, YAMLError) as error:  # ValueError: a path with a NUL
            self.problems.append(f"{asked_at}: {printable(str(path))} cannot be read: {' '.join(str(error).split())}")
            return {}
        if node is None:
            return {}
        if not isinstance(node, MappingNode):
            self.problems.append(f"{path}:1: a config consists of sections, `name:` with indented lines below it")
            return {}
        # The base is read before this file's places are noted, so that a place is always that of the value in force.
        base: dict[str, Any] = {}
        for key, value in node.value:
            if key.value == "extends":
                line = f"{path}:{key.start_mark.line + 1}"
                if isinstance(value, ScalarNode) and value.value.endswith((".yaml", ".yml")):
                    named = path.parent / value.value
                    base = self.read(
                        named if named.exists() else presets.find(value.value) or named, line, (*chain, path)
                    )
                else:  # another kind of file is not opened: messages about its content would print parts of it
                    self.problems.append(f"{line}: extends must name one YAML file, .yaml or .yml")
        tree = self._tree(node, (), lambda part: f"{path}:{part.start_mark.line + 1}")
        tree.pop("extends", None)
        is_of_run = path.name == "config.yaml" and any((path.parent / name).exists() for name in _WRITTEN_BY_RUNS)
        return _merge(base, upgraded(tree) if is_of_run else tree)

    def arguments(
        self, words: Sequence[str], flags: Mapping[str, str]
    ) -> tuple[list[tuple[FieldPath, str]], list[str], set[str]]:
        """Splits words into settings (field and text, in order), words that belong to no option, and flags."""
        settings: list[tuple[FieldPath, str]] = []
        stray: list[str] = []
        given: set[str] = set()
        self.options = list(flags)
        queue = list(words)
        while queue:
            word = queue.pop(0)
            if not word.startswith("--"):
                stray.append(word)
                continue
            name, equals, text = word[2:].partition("=")
            path = tuple(name.replace("-", "_").split("."))
            if path[0] in flags and len(path) == 1:
                given.add(path[0])
                if equals:
                    self.problems.append(f"command line: --{path[0]} takes no value")
                continue
            annotation = field_type(self.schema, path)
            negated = (*path[:-1], path[-1].removeprefix("no_"))
            if annotation is None and not equals and field_type(self.schema, negated) is bool:
                path, annotation, equals, text = negated, bool, "=", "false"
            if not equals and annotation is bool and not (queue and queue[0].lower() in ("true", "false")):
                equals, text = "=", "true"
            if not equals:
                if queue and not queue[0].startswith("--"):
                    text = queue.pop(0)
                elif annotation is not None:
                    self.problems.append(f"command line: --{printable(name)} needs a value")
                    continue
            if annotation is None:
                self._unknown(path, text.startswith("{"), "command line")
            else:
                settings.append((path, text))
        return settings, stray, given

    def validate(self, tree: dict[str, Any], settings: Sequence[tuple[FieldPath, str]]) -> Any:
        """The config, or one ConfigError with every problem of files, command line and values."""
        # One after the other, because `--model.memory null --model.memory.num_keys 8` starts from the defaults again.
        for path, text in settings:
            self.places[path] = "command line"
            value = self._from_text(text, field_type(self.schema, path), path)
            tree = _merge(tree, functools.reduce(lambda inner, part: {part: inner}, reversed(path), value))
        self._refuse_unknown(self.schema, tree, ())
        tree = self._without_undecodable(tree, ())
        config = None
        try:
            # JSON is what pydantic reads strictly and yet turns lists into tuples and 1 into 1.0 from.
            config = pydantic.TypeAdapter(self.schema).validate_json(json.dumps(tree), strict=True)
        except pydantic.ValidationError as error:
            for item in error.errors(include_url=False):
                self._describe(item)
        if self.problems:
            raise ConfigError(self.problems)
        return config

    def _tree(self, node: Node, path: FieldPath, place: Callable[[Node], str], depth: int = 0) -> Any:
        if isinstance(node, ScalarNode):
            return scalar(node)
        if depth > DEEPEST:
            self.problems.append(f"{place(node)}: {printable('.'.join(path))}: nested more than {DEEPEST} levels deep")
            return None
        if isinstance(node, SequenceNode):
            return [self._tree(item, path, place, depth + 1) for item in node.value]
        tree: dict[str, Any] = {}
        for key, value in node.value:
            inner = (*path, str(key.value))
            if not isinstance(key, ScalarNode):
                self.problems.append(f"{place(key)}: a name must be a single word")
            elif key.value in tree:
                name = printable(".".join(inner))
                self.problems.append(f"{place(key)}: {name}: given twice; first at {self.places[inner]}")
            else:
                self.places[inner] = place(key)
                tree[key.value] = self._tree(value, inner, place, depth + 1)
        return tree

    def _from_text(self, text: str, annotation: Any, path: FieldPath) -> Any:
        inner, optional = unwrap(annotation)
        # The field's type decides: `none` is a gate but no clip, and a folder may be called 2026.
        if typing.get_origin(inner) is Literal and text in typing.get_args(inner):
            return text
        if optional and text.lower() in ("null", "none"):
            return None
        if inner is str:
            return text
        if typing.get_origin(inner) is tuple and not text.startswith("["):
            text = f"[{text}]"
        try:
            node = compose(text)
        except (YAMLError, RecursionError):
            return text
        return text if node is None else self._tree(node, path, lambda _: "command line")

    def _without_undecodable(self, value: Any, path: FieldPath) -> Any:
        """The tree without text that UTF-8 cannot express (lone surrogates, undecodable bytes of the command line)."""
        if isinstance(value, dict):
            return {
                name: self._without_undecodable(inner, (*path, name))
                for name, inner in value.items()
                if _encodable(name)  # else it is an unknown setting, which was refused
            }
        if isinstance(value, list):
            return [self._without_undecodable(inner, path) for inner in value]
        if not isinstance(value, str) or _encodable(value):
            return value
        way_out = ""
        if sys.getfilesystemencoding() != "utf-8":
            way_out = f"; this locale is {sys.getfilesystemencoding()}: set PYTHONUTF8=1 for other letters"
        self.problems.append(
            f"{self._nearest(path)}: {'.'.join(path)}='{shortened(printable(value))}' is not text in UTF-8{way_out}"
        )
        return None if unwrap(field_type(self.schema, path))[1] else ""

    def _refuse_unknown(self, section: type, tree: dict[str, Any], path: FieldPath) -> None:
        annotations = field_types(section)
        for name, value in tree.items():
            inner = annotations.get(name)
            if inner is None:
                self._unknown((*path, name), isinstance(value, dict), self.places[(*path, name)])
            elif isinstance(value, dict) and (deeper := section_of(inner)):
                self._refuse_unknown(deeper, value, (*path, name))
            elif isinstance(value, list) and (item := item_section_of(inner)):
                self._refuse_unknown_in_items(item, value, (*path, name))

    def _refuse_unknown_in_items(self, section: type, items: list[Any], path: FieldPath) -> None:
        """Items are whole: a section of a list has no sections in it."""
        known = list(field_types(section))
        for number, item in enumerate(items):
            for name in item if isinstance(item, dict) else ():
                if name not in known:
                    hint = _did_you_mean(_close(name, known)) or f"; known: {', '.join(known)}"
                    place = self._nearest((*path, name))
                    self.problems.append(
                        f"{place}: {'.'.join(path)}[{number}].{printable(name)}: unknown setting{hint}"
                    )

    def _unknown(self, path: FieldPath, is_section: bool, place: str) -> None:
        name = ".".join(path)
        if name in self.known:
            self.problems.append(f"{place}: {name}: write sections as indented lines, not with dots")
            return
        if new_name(name) in self.known:
            self.problems.append(f"{place}: {name} is now {new_name(name)}")
            return
        self.unknown += 1
        # Each hint compares the name with every setting; a file of thousands of unknown names is no misspelt config.
        hint = _did_you_mean(self._similar(path, is_section)) if self.unknown <= SHOWN_PROBLEMS else ""
        self.problems.append(f"{place}: {shortened(printable(name))}: unknown setting{hint}")

    def _similar(self, path: FieldPath, is_section: bool) -> list[str]:
        """The setting that is meant most likely; empty where none is similar.

        The dotted paths are compared as a whole, so that a misspelt section does not lead into another one. A name
        that exists in another section only is looked for there.
        """
        known = self.known
        same_kind = [name for name, section in known.items() if section == is_section] + self.options
        if found := _close(".".join(path), same_kind, last=path[-1]):
            return found
        same_name = [name for name in same_kind if name.rpartition(".")[2] == path[-1]]
        if same_name:
            return sorted(same_name, key=lambda name: name.partition(".")[0] != path[0])[:1]
        if found := _close(".".join(path), [*known, *self.options]):
            return found
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        return [leaves[leaf] for leaf in _close(path[-1], list(leaves))]

    def _describe(self, item: Any) -> None:
        path = tuple(part for part in item["loc"] if isinstance(part, str))
        dotted = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item["loc"]).lstrip(".")
        if item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                # Of the fields in the message, the first that was written is the one to look at.
                named = [(*path, *name.split(".")) for name in re.findall(r"([a-z_][\w.]*)=", line)]
                place = next((self.places[field] for field in named if field in self.places), self._nearest(path))
                joint = "" if not dotted else "." if re.match(r"[a-z_][\w.]*=", line) else ": "
                self.problems.append(f"{place}: {dotted}{joint}{printable(line)}")
            return
        annotation = field_type(self.schema, path)
        if item["type"] == "missing":
            problem = f"{dotted} is missing: it must be {in_words(annotation)}"
        elif annotation is None:
            problem = f"{dotted or 'config'}: {item['msg']}"
        else:
            inner, _ = unwrap(annotation)
            expected = annotation if path and item["loc"][-1] == path[-1] else typing.get_args(inner)[0]
            options = [option for option in typing.get_args(inner) if isinstance(option, str)]
            found = new_value(dotted, item["input"])
            hint = f"; it is now {found!r}" if found else _did_you_mean(_close(str(item["input"])[:100], options))
            problem = f"{dotted}={shortened(show(item['input']))} must be {in_words(expected)}{hint}"
        self.problems.append(f"{self._nearest(path)}: {problem}")

    def _nearest(self, path: FieldPath) -> str:
        lengths = range(len(path), -1, -1)
        return next((self.places[path[:size]] for size in lengths if path[:size] in self.places), "command line")


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        # A section over null starts from the defaults: a dense base, and then a memory section.
        merged[name] = _merge(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def _close(name: str, names: Sequence[str], *, cutoff: float = 0.72, last: str = "") -> list[str]:
    """The most similar of some names, in a list; the `last` part of a dotted name must be similar too."""

    def similarity(other: str) -> float:
        leaf = other.rpartition(".")[2]
        if last and _ratio(leaf, last) < 0.6:  # a long path in common would hide that the names are different
            return 0.0
        is_near = last and (leaf == last or other.rpartition(".")[0] == name.rpartition(".")[0])
        return _ratio(other, name) + (0.06 if is_near else 0.0)

    found = max(names, key=similarity, default="")
    if not found or similarity(found) < cutoff:
        return []
    # Of sections that have the same setting and are about as similar, the first one.
    leaf, limit = found.rpartition(".")[2], similarity(found) - 0.05
    return [next(name for name in names if name.rpartition(".")[2] == leaf and similarity(name) >= limit)]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other[:200], autojunk=False).ratio()


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def _encodable(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)
