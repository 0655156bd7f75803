"""The text that --help prints: every setting, with what the schema says of it."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping
from typing import Any, Literal

from memjax.command_schema import PLAIN_TYPES, FieldPath, field_types, item_section_of, section_of, show, unwrap


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Positional:
    """The argument of a command line that has no `--name`."""

    name: str
    """What help calls it."""
    help: str
    """What it is."""
    required: bool = True
    """Whether the command refuses to start without it."""
    repeats: bool = False
    """Whether there may be several."""
    is_config: bool = False
    """Whether it is the YAML file that the settings are read from."""


_GRAMMAR = (
    "Later settings win over earlier ones, and all of them over the file. Lists: 1,2 or '[1, 2]'. "
    "Yes or no: --a.b, --a.no-b or --a.b false."
)


# tyro's help was tried and left: it tells of its own grammar (lists with spaces, no `section null`), not of this one.
def help_text(
    schema: type, prog: str, description: str, positional: Positional | None, flags: Mapping[str, str]
) -> str:
    """The whole help of a command; the arguments are those of `memjax.command_line.parse`."""
    width = min(shutil.get_terminal_size().columns, 120)

    def indented(text: str, spaces: int) -> str:
        return textwrap.fill(text, width, initial_indent=" " * spaces, subsequent_indent=" " * spaces)

    usage = ""
    if positional:
        usage = f" {positional.name}" if positional.required else f" [{positional.name}]"
        usage += f" [{positional.name} ...]" if positional.repeats else ""
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

    def add(section: type, path: FieldPath) -> None:
        title = ".".join(path) or "settings"
        summary = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
        docs, deeper, items = field_docs(section), [], []
        if not all(section_of(annotation) for annotation in field_types(section).values()):
            lines.extend(["", indented(f"{title}: {' '.join(summary.split())}", 0)])
        for field in dataclasses.fields(section):
            annotation = field_types(section)[field.name]
            name, inner = ".".join((*path, field.name)), section_of(annotation)
            if inner:
                deeper.append((inner, (*path, field.name)))
                if unwrap(annotation)[1]:
                    off = " (default: null)" if field.default is None else ""
                    lines.extend([f"  --{name} null|{{}}", indented(f"{docs.get(field.name, '')}{off}", 6)])
                continue
            if item := item_section_of(annotation):
                items.append((item, (*path, f"{field.name}[]")))
            default = field.default_factory() if callable(field.default_factory) else field.default
            shown = "required" if default is dataclasses.MISSING else f"default: {show(default)}"
            # The settings of a list's items have no option of their own: they stand inside the list.
            dashes = "" if any(part.endswith("[]") for part in path) else "--"
            lines.extend(
                [f"  {dashes}{name} {metavar(annotation)}", indented(f"{docs.get(field.name, '')} ({shown})", 6)]
            )
        for inner, where in deeper + items:
            add(inner, where)

    add(schema, ())
    return "\n".join(lines)


def metavar(annotation: Any) -> str:
    """What stands for a value of this type behind the name of its setting."""
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


def field_docs(section: type) -> dict[str, str]:
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
