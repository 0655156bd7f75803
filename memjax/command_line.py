"""Configs from YAML files and command lines: one strict validation, every problem at once, each with its place.

A schema is a frozen dataclass, see memjax.config. Nothing here imports JAX, so a wrong config is refused at once.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pydantic
import yaml
from yaml.composer import ComposerError

T = TypeVar("T")
_Path = tuple[str, ...]
_NO_FLAGS: Mapping[str, str] = types.MappingProxyType({})


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line a problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Positional:
    """The argument of a command line that has no `--name`."""

    name: str
    """What help calls it."""
    help: str
    """What it is."""
    required: bool = True
    """Whether the command refuses to start without it."""
    is_config: bool = False
    """Whether it is the YAML file that the settings are read from."""


CONFIG_FILE = Positional(
    name="CONFIG.yaml", help="Settings of the run; without it, the defaults.", required=False, is_config=True
)
RUN_FOLDER = Positional(name="RUN", help="The folder of a run.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parsed(Generic[T]):
    """What a command line asked for."""

    config: T
    """The validated settings."""
    positional: str | None
    """The positional argument as given."""
    flags: frozenset[str]
    """The bare flags that were given, with underscores."""


def load(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The config of a YAML file (and of the file it `extends`) with overrides such as `--model.dim 64` on top.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    sources = _Sources(schema)
    tree = sources.read(path, "command line") if path else {}
    settings, stray, _ = sources.arguments(overrides, _NO_FLAGS)
    sources.problems += [f"command line: {word!r} is not a setting; write --section.key value" for word in stray]
    return sources.validate(tree, settings)


def parse(
    schema: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: Positional | None = CONFIG_FILE,
    flags: Mapping[str, str] = _NO_FLAGS,
) -> Parsed[T]:
    """The settings and other arguments of a command line; ends the process on --help (0) and on problems (2).

    Args:
        schema: The dataclass whose fields the options name.
        argv: The arguments, without the program's name.
        prog: The command, as help and errors call it.
        description: What the command does.
        positional: The argument without a name; None where there is none.
        flags: Options without a value: name (with underscores) and help.
    """
    if "-h" in argv or "--help" in argv:
        print(_help(schema, prog, description, positional, flags))
        sys.exit(0)
    sources = _Sources(schema)
    settings, stray, given = sources.arguments(argv, flags)
    first = stray.pop(0) if stray and positional else None
    tree = sources.read(Path(first), "command line") if first and positional and positional.is_config else {}
    sources.problems += [f"command line: {word!r} is one argument too many" for word in stray]
    if positional and positional.required and first is None:
        sources.problems.append(f"command line: {positional.name} is missing: {positional.help}")
    try:
        config = sources.validate(tree, settings)
    except ConfigError as error:
        count = "1 problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
        lines = [f"{prog}: {count}", *(f"  {problem}" for problem in error.problems), "--help lists every setting."]
        print("\n".join(lines), file=sys.stderr)
        sys.exit(2)
    return Parsed(config=config, positional=first, flags=frozenset(given))


def to_yaml(config: Any) -> str:
    """The whole config as YAML from which `load` makes an equal one."""
    tree = dataclasses.asdict(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def differences(old: Any, new: Any, _prefix: str = "") -> list[str]:
    """The fields in which two configs of one schema differ, such as `optim.lr: 0.006 -> 0.001`."""
    lines: list[str] = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            lines += differences(before, after, f"{_prefix}{field.name}.")
        elif before != after:
            lines.append(f"{_prefix}{field.name}: {_show(before)} -> {_show(after)}")
    return lines


class _Sources:
    """What files and command line say, where they say it, and what is wrong with it."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.places: dict[_Path, str] = {}
        self.problems: list[str] = []
        self.options: list[str] = []

    def read(self, path: Path, asked_at: str, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The tree of a file merged over that of the file it extends."""
        if path.resolve() in [link.resolve() for link in chain]:
            circle = " -> ".join(str(link) for link in (*chain, path))
            self.problems.append(f"{asked_at}: extends goes round in a circle: {circle}")
            return {}
        self.places.setdefault((), str(path))
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
        except FileNotFoundError:
            names = [str(other) for other in path.parent.glob("*.yaml")]
            self.problems.append(f"{asked_at}: {path} does not exist{_did_you_mean(_close(str(path), names))}")
            return {}
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.problems.append(f"{path}:{line}: not valid YAML: {error.problem}")
            return {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.problems.append(f"{asked_at}: {path} cannot be read: {' '.join(str(error).split())}")
            return {}
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.problems.append(f"{path}:1: a config consists of sections, `name:` with indented lines below it")
            return {}
        # The base is read before this file's places are noted, so that a place is always that of the value in force.
        base: dict[str, Any] = {}
        for key, value in node.value:
            if key.value == "extends":
                line = f"{path}:{key.start_mark.line + 1}"
                if isinstance(value, yaml.ScalarNode) and value.value:
                    base = self.read(path.parent / value.value, line, (*chain, path))
                else:
                    self.problems.append(f"{line}: extends must name one YAML file")
        tree = self._tree(node, (), lambda part: f"{path}:{part.start_mark.line + 1}")
        tree.pop("extends", None)
        return _merge(base, tree)

    def arguments(
        self, words: Sequence[str], flags: Mapping[str, str]
    ) -> tuple[list[tuple[_Path, str]], list[str], set[str]]:
        """Splits words into settings (field and text, in order), words that belong to no option, and flags."""
        settings: list[tuple[_Path, str]] = []
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
            if path[0] in flags and len(path) == 1 and not equals:
                given.add(path[0])
                continue
            annotation = _annotation(self.schema, path)
            negated = (*path[:-1], path[-1].removeprefix("no_"))
            if annotation is None and not equals and _annotation(self.schema, negated) is bool:
                path, annotation, equals, text = negated, bool, "=", "false"
            if not equals and annotation is bool and not (queue and queue[0].lower() in ("true", "false")):
                equals, text = "=", "true"
            if not equals:
                if queue and not queue[0].startswith("--"):
                    text = queue.pop(0)
                elif annotation is not None:
                    self.problems.append(f"command line: --{name} needs a value")
                    continue
            if annotation is None:
                self._unknown(path, text.startswith("{"), "command line")
            else:
                settings.append((path, text))
        return settings, stray, given

    def validate(self, tree: dict[str, Any], settings: Sequence[tuple[_Path, str]]) -> Any:
        """The config, or one ConfigError with every problem of files, command line and values."""
        # One after the other, because `--model.memory null --model.memory.num_keys 8` starts from the defaults again.
        for path, text in settings:
            self.places[path] = "command line"
            value = self._from_text(text, _annotation(self.schema, path), path)
            tree = _merge(tree, functools.reduce(lambda inner, part: {part: inner}, reversed(path), value))
        self._refuse_unknown(self.schema, tree, ())
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

    def _tree(self, node: yaml.Node, path: _Path, place: Callable[[yaml.Node], str]) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._tree(item, path, place) for item in node.value]
        tree: dict[str, Any] = {}
        for key, value in node.value:
            inner = (*path, str(key.value))
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{place(key)}: a name must be a single word")
            elif key.value in tree:
                self.problems.append(f"{place(key)}: {'.'.join(inner)}: given twice; first at {self.places[inner]}")
            else:
                self.places[inner] = place(key)
                tree[key.value] = self._tree(value, inner, place)
        return tree

    def _from_text(self, text: str, annotation: Any, path: _Path) -> Any:
        inner, optional = _unwrap(annotation)
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
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError:
            return text
        return text if node is None else self._tree(node, path, lambda _: "command line")

    def _refuse_unknown(self, section: type, tree: dict[str, Any], path: _Path) -> None:
        annotations = _annotations(section)
        for name, value in tree.items():
            inner = annotations.get(name)
            if inner is None:
                self._unknown((*path, name), isinstance(value, dict), self.places[(*path, name)])
            elif isinstance(value, dict) and (deeper := _section(inner)):
                self._refuse_unknown(deeper, value, (*path, name))
            elif isinstance(value, list) and (item := _item_section(inner)):
                self._refuse_unknown_in_items(item, value, (*path, name))

    def _refuse_unknown_in_items(self, section: type, items: list[Any], path: _Path) -> None:
        """Items are whole: a section of a list has no sections in it."""
        known = list(_annotations(section))
        for number, item in enumerate(items):
            for name in item if isinstance(item, dict) else ():
                if name not in known:
                    hint = _did_you_mean(_close(name, known)) or f"; known: {', '.join(known)}"
                    place = self._nearest((*path, name))
                    self.problems.append(f"{place}: {'.'.join(path)}[{number}].{name}: unknown setting{hint}")

    def _unknown(self, path: _Path, is_section: bool, place: str) -> None:
        name = ".".join(path)
        known = {".".join(where): _section(annotation) is not None for where, annotation in _walk(self.schema)}
        if name in known:
            self.problems.append(f"{place}: {name}: write sections as indented lines, not with dots")
            return
        # First the same name in another section, with as much of its own path as can be found; then a similar name.
        found: list[str] = []
        for start in range(len(path)):
            tail = "." + ".".join(path[start:])
            found = found or [other for other in known if f".{other}".endswith(tail)]
        found = [other for other in found if known[other] == is_section] or found
        siblings = [other for other in known if other.rpartition(".")[0] == ".".join(path[:-1])]
        leaves = {other.rpartition(".")[2]: other for other in known}
        found = (
            found[:3]
            or _close(name, siblings)
            or _close(name, [*known, *self.options])
            or [leaves[leaf] for leaf in _close(path[-1], list(leaves))]
        )
        self.problems.append(f"{place}: {name}: unknown setting{_did_you_mean(found)}")

    def _describe(self, item: Any) -> None:
        path = tuple(part for part in item["loc"] if isinstance(part, str))
        dotted = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item["loc"]).lstrip(".")
        if item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                # Of the fields in the message, the first that was written is the one to look at.
                named = [(*path, *name.split(".")) for name in re.findall(r"([a-z_][\w.]*)=", line)]
                place = next((self.places[field] for field in named if field in self.places), self._nearest(path))
                joint = "" if not dotted else "." if re.match(r"[a-z_][\w.]*=", line) else ": "
                self.problems.append(f"{place}: {dotted}{joint}{line}")
            return
        annotation = _annotation(self.schema, path)
        if item["type"] == "missing":
            problem = f"{dotted} is missing: it must be {_expected(annotation)}"
        elif annotation is None:
            problem = f"{dotted or 'config'}: {item['msg']}"
        else:
            inner, _ = _unwrap(annotation)
            expected = annotation if path and item["loc"][-1] == path[-1] else typing.get_args(inner)[0]
            options = [option for option in typing.get_args(inner) if isinstance(option, str)]
            hint = _did_you_mean(_close(str(item["input"]), options))
            problem = f"{dotted}={_show(item['input'])} must be {_expected(expected)}{hint}"
        self.problems.append(f"{self._nearest(path)}: {problem}")

    def _nearest(self, path: _Path) -> str:
        lengths = range(len(path), -1, -1)
        return next((self.places[path[:size]] for size in lengths if path[:size] in self.places), "command line")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (3e-4 is a number, `no` is text), without tags, anchors and aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            what = "tags (!) and anchors (&, *) are not allowed; quote the text, or use `extends:`"
            raise ComposerError(None, None, what, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_DIGITS = "0123456789"
for _kind, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9](?:_?[0-9])*)", list("-+" + _DIGITS)),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+." + _DIGITS),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _starts)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _scalar(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value.replace("_", "")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    # What overflows stays text, so that the validation refuses it with its name.
    if kind == "int" and len(text) < 40:
        return int(text)
    if kind == "float" and math.isfinite(float(text)):
        return float(text)
    return node.value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        # A section over null starts from the defaults: a dense base, and then a memory section.
        merged[name] = _merge(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged


@functools.cache
def _annotations(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), other types as (type, False)."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        return functools.reduce(lambda left, right: left | right, members), True
    return annotation, False


def _section(annotation: Any) -> type | None:
    inner, _ = _unwrap(annotation)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _item_section(annotation: Any) -> type | None:
    """The section that the items of a list are."""
    arguments = typing.get_args(_unwrap(annotation)[0])
    return _section(arguments[0]) if arguments and typing.get_origin(_unwrap(annotation)[0]) is tuple else None


def _walk(section: type, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, annotation in _annotations(section).items():
        yield (*path, name), annotation
        if deeper := _section(annotation):
            yield from _walk(deeper, (*path, name))


def _annotation(section: type, path: _Path) -> Any:
    """The type of a field; None where there is no such field."""
    annotation: Any = section
    for name in path:
        inner = _section(annotation)
        annotation = _annotations(inner).get(name) if inner else None
    return annotation


def _close(name: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.7)


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def _show(value: Any) -> str:
    """A value as it stands in YAML, on one line."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(inner) for inner in value) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


_PLAIN_TYPES = {
    int: ("a whole number", "INT"),
    float: ("a number", "NUMBER"),
    bool: ("true or false", "BOOL"),
    str: ("text, in quotes if it looks like a number", "TEXT"),
}


def _expected(annotation: Any) -> str:
    inner, optional = _unwrap(annotation)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        text = f"one of {', '.join(_show(option) for option in arguments)}"
    elif typing.get_origin(inner) is tuple:
        text = f"a list, each item {_expected(arguments[0])}"
    elif _section(inner):
        text = "a section, with its settings on indented lines"
    else:
        text = _PLAIN_TYPES.get(inner, (str(inner), ""))[0]
    return f"{text}, or null" if optional else text


_GRAMMAR = (
    "Later settings win over earlier ones, and all of them over the file. Lists: 1,2 or '[1, 2]'. "
    "Yes or no: --a.b, --a.no-b or --a.b false."
)


# tyro's help was tried and left: it tells of its own grammar (lists with spaces, no `section null`), not of this one.
def _help(schema: type, prog: str, description: str, positional: Positional | None, flags: Mapping[str, str]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)

    def indented(text: str, spaces: int) -> str:
        return textwrap.fill(text, width, initial_indent=" " * spaces, subsequent_indent=" " * spaces)

    usage = "" if positional is None else f" {positional.name}" if positional.required else f" [{positional.name}]"
    lines = [f"usage: {prog}{usage} [--setting value ...]", "", indented(description, 0), ""]
    if positional:
        lines += [f"  {positional.name}", indented(positional.help, 6)]
    for name, text in flags.items():
        lines += [f"  --{name}", indented(text, 6)]
    lines += ["  -h, --help", indented("Show this and stop.", 6)]
    lines += [
        "",
        indented(_GRAMMAR, 0),
    ]

    def add(section: type, path: _Path) -> None:
        title = ".".join(path) or "settings"
        summary = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
        docs, deeper = _field_docs(section), []
        if not all(_section(annotation) for annotation in _annotations(section).values()):
            lines.extend(["", indented(f"{title}: {' '.join(summary.split())}", 0)])
        for field in dataclasses.fields(section):
            annotation = _annotations(section)[field.name]
            name, inner = ".".join((*path, field.name)), _section(annotation)
            if inner:
                deeper.append((inner, (*path, field.name)))
                if _unwrap(annotation)[1]:
                    lines.extend([f"  --{name} null", indented(docs.get(field.name, ""), 6)])
                continue
            default = field.default_factory() if callable(field.default_factory) else field.default
            shown = "required" if default is dataclasses.MISSING else f"default: {_show(default)}"
            lines.extend([f"  --{name} {_metavar(annotation)}", indented(f"{docs.get(field.name, '')} ({shown})", 6)])
        for inner, where in deeper:
            add(inner, where)

    add(schema, ())
    return "\n".join(lines)


def _metavar(annotation: Any) -> str:
    inner, optional = _unwrap(annotation)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        text = "|".join(str(option) for option in arguments)
    elif typing.get_origin(inner) is tuple:
        text = f"{_metavar(arguments[0])},..."
    else:
        text = _PLAIN_TYPES.get(inner, ("", "VALUE"))[1]
    return f"{text}|null" if optional else text


def _field_docs(section: type) -> dict[str, str]:
    """The string literal under each field, also of inherited ones."""
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if dataclasses.is_dataclass(owner):
            definition = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0])
            for field, below in zip(definition.body, definition.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    literal = below.value if isinstance(below, ast.Expr) else None
                    if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                        docs[field.target.id] = " ".join(literal.value.split())
    return docs
