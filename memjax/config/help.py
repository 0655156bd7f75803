"""The text of --help: every setting, with its type, documentation and default."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from memjax.config.schema import PLAIN_TYPES, FieldPath, field_types, item_section_of, section_of, show, unwrap


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Positional:
    """A positional argument of a command."""

    name: str
    """Name in the help."""
    help: str
    """Text in the help."""
    required: bool = True
    """Whether it must be given."""
    repeats: bool = False
    """Whether there may be several."""
    is_config: bool = False
    """Whether settings are read from it."""
    is_read: bool = False
    """Whether it is only read, and may therefore be a remote address."""


_GRAMMAR = (
    "Later settings win over earlier ones, and all of them over the file. Lists: 1,2 or '[1, 2]'. "
    "Yes or no: --a.b, --a.no-b or --a.b false."
)


# tyro's help was tried and dropped: it describes its own grammar (lists with spaces, no `section null`), not this one.
def help_text(
    schema: type,
    prog: str,
    description: str,
    positional: Positional | None,
    flags: Mapping[str, str],
    examples: Sequence[str] = (),
) -> str:
    """The help of a command; takes the arguments of `memjax.config.load.parse`."""
    usage = ""
    if positional:
        usage = f" {positional.name}" if positional.required else f" [{positional.name}]"
        usage += f" [{positional.name} ...]" if positional.repeats else ""
    lines = [*_wrapped(f"usage: {prog}{usage} [--setting value ...]", 0), "", *_wrapped(description, 0), ""]
    if examples:
        lines += ["examples:", *(f"  {example}" for example in examples), ""]
    if positional:
        lines += [f"  {positional.name}", *_wrapped(positional.help, 6)]
    for name, text in flags.items():
        lines += [f"  --{name}", *_wrapped(text, 6)]
    has_sections = any(section_of(annotation) for annotation in field_types(schema).values())
    lines += ["  -h, --help [SECTION]" if has_sections else "  -h, --help"]
    lines += _wrapped("Show this, or one section or setting of it, and stop." if has_sections else _SHOW_THIS, 6)
    lines += ["", *_wrapped(_GRAMMAR, 0), *_section_lines(schema, ())]
    return "\n".join(lines)


_SHOW_THIS = "Show this and stop."


def section_help(schema: type, topic: str) -> str | None:
    """The help of one section or setting, named by its dotted path; None if it does not exist."""
    path = tuple(topic.split("."))
    annotation: Any = schema
    owner: type = schema
    for name in path:
        inner = section_of(annotation)
        if inner is None or name not in field_types(inner):
            return None
        owner, annotation = inner, field_types(inner)[name]
    section = section_of(annotation)
    head = _field_lines(owner, path, annotation)
    lines = head if section is None else [*(head if unwrap(annotation)[1] else []), *_section_lines(section, path)]
    if item := item_section_of(annotation):
        lines += _section_lines(item, (*path[:-1], f"{path[-1]}[]"))
    return "\n".join(lines).lstrip("\n")


def _section_lines(section: type, path: FieldPath) -> list[str]:
    """The help lines of a section, its settings, and nested sections."""
    lines: list[str] = []
    summary = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
    deeper: list[tuple[type, FieldPath]] = []
    items: list[tuple[type, FieldPath]] = []
    if not all(section_of(annotation) for annotation in field_types(section).values()):
        lines += ["", *_wrapped(f"{'.'.join(path) or 'settings'}: {' '.join(summary.split())}", 0)]
    for name, annotation in field_types(section).items():
        if inner := section_of(annotation):
            deeper.append((inner, (*path, name)))
            if not unwrap(annotation)[1]:
                continue
        if item := item_section_of(annotation):
            items.append((item, (*path, f"{name}[]")))
        lines += _field_lines(section, (*path, name), annotation)
    for inner, where in deeper + items:
        lines += _section_lines(inner, where)
    return lines


def _field_lines(section: type, path: FieldPath, annotation: Any) -> list[str]:
    """The help lines of a setting: name, placeholder, documentation and default."""
    (field,) = (field for field in dataclasses.fields(section) if field.name == path[-1])
    doc = field_docs(section).get(field.name, "")
    if section_of(annotation):
        off = " (default: null)" if field.default is None else ""
        return [f"  --{'.'.join(path)} null|{{}}", *_wrapped(f"{doc}{off}", 6)]
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "required" if default is dataclasses.MISSING else f"default: {show(default)}"
    # Settings of list items are not options: they are given inside the list.
    dashes = "" if any(part.endswith("[]") for part in path) else "--"
    name, value = f"{dashes}{'.'.join(path)}", metavar(annotation)
    if len(name) + len(value) + 3 <= _width():
        lines = [f"  {name} {value}"]
    else:
        lines = [f"  {name}", *_wrapped(value.replace("|", "| "), 6)]
    return [*lines, *_wrapped(f"{doc} ({shown})", 6)]


def _width() -> int:
    return max(20, min(shutil.get_terminal_size().columns, 120))


def _wrapped(text: str, spaces: int) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=" " * spaces, subsequent_indent=" " * spaces)


def metavar(annotation: Any) -> str:
    """The placeholder for a value of this type, as in --setting VALUE."""
    inner, optional = unwrap(annotation)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        text = "|".join(str(option) for option in arguments)
    elif item := item_section_of(inner):
        required = [field.name for field in dataclasses.fields(item) if field.default is dataclasses.MISSING]
        text = f"[{{{','.join(f'{name}:...' for name in required)}}},...]"
    elif typing.get_origin(inner) is tuple:
        text = f"{metavar(arguments[0])},..."
    else:
        text = PLAIN_TYPES.get(inner, ("", "VALUE"))[1]
    return f"{text}|null" if optional else text


@functools.cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring below each field, including inherited fields."""
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
