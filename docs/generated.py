"""The parts of the pages that are made from the code when the site is built, as MyST text.

A page holds a line such as `<!-- generated: settings -->`; conf.py puts what the function of that name returns in its
place. Nothing of it is committed, so a new setting or command appears without anybody writing it down.
"""

import contextlib
import dataclasses
import html
import importlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator
from unittest import mock

import figure
import results

from memjax.__main__ import COMMANDS
from memjax.config.help import field_docs, metavar
from memjax.config.run import RunConfig
from memjax.config.schema import field_types, item_section_of, section_of, show, unwrap

HELP_COLUMNS = 84


def settings() -> str:
    """Every section of a run's config with its fields: name, type, default and the docstring below the field."""
    return "\n".join(_section(RunConfig, ()))


def commands() -> str:
    """Every command line with its help."""
    return "\n".join(line for name in COMMANDS for line in _command(name))


def help_text(name: str) -> str:
    """What `python -m memjax.<name> --help` prints."""
    module = importlib.import_module(f"memjax.{name}")
    printed = io.StringIO()
    columns = mock.patch.dict(os.environ, {"COLUMNS": str(HELP_COLUMNS)})
    with columns, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return printed.getvalue()


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "commands": commands,
    "paper_table": results.paper_table,
}
PICTURES: dict[str, Callable[[], str]] = {
    "block": figure.block,
    "memory_layer": figure.memory_layer,
    "levels": figure.levels,
    "facts_curve": results.facts_curve,
    "facts_bars": results.facts_bars,
    "real_facts_bars": results.real_facts_bars,
    "operation_bars": results.operation_bars,
    "step_bars": results.step_bars,
    "generation_bars": results.generation_bars,
}
"""Functions that return SVG elements, by the names of their marks."""
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_CODE = re.compile(r"\[`([\w.]+)`\]\(\.\./memjax/([\w/]+)\.py\)")


def fill_in(page: str) -> str:
    """A page with every mark replaced by what it stands for, and names that lead to code with their modules.

    Raises:
        KeyError: a mark names nothing that can be generated.
    """
    page = _CODE.sub(lambda link: f"[`{link[2].replace('/', '.')}.{link[1]}`](../memjax/{link[2]}.py)", page)
    return _MARK.sub(lambda mark: _made(mark[1]), page)


def _made(name: str) -> str:
    if name in PICTURES:
        return f"```{{raw}} html\n{PICTURES[name]()}\n```\n"
    return GENERATED[name]()


def _section(section: type, path: tuple[str, ...]) -> Iterator[str]:
    # How types and defaults are written is the command line's business, so that page and --help say the same.
    docs, annotations, deeper = field_docs(section), field_types(section), []
    if path:
        summary = " ".join(inspect.cleandoc(section.__doc__ or "").split())
        yield from (f"{'#' * (1 + len(path))} {'.'.join(path)}", "", _escaped(summary), "")
    for field in dataclasses.fields(section):
        annotation, name = annotations[field.name], ".".join((*path, field.name))
        if inner := section_of(annotation):
            deeper.append((inner, (*path, field.name)))
            if unwrap(annotation)[1]:
                yield from _setting(name, "section | null", "the section below", docs.get(field.name, ""))
            continue
        if item := item_section_of(annotation):
            deeper.append((item, (*path, f"{field.name}[]")))
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "required" if default is dataclasses.MISSING else f"`{show(default)}`"
        yield from _setting(name, metavar(annotation).replace("|", " | "), shown, docs.get(field.name, ""))
    for inner, where in deeper:
        yield from _section(inner, where)


def _setting(name: str, kind: str, default: str, text: str) -> Iterator[str]:
    yield from (f"```{{confval}} {name}", f":type: `{kind}`", f":default: {default}", "", _escaped(text), "```", "")


def _command(name: str) -> Iterator[str]:
    module = importlib.import_module(f"memjax.{name}")
    # The module's first sentence: what it does, after the command itself.
    summary = (module.__doc__ or "").strip().partition("\n\n")[0]
    shown = html.escape(help_text(name))
    yield from (f"({name})=", f"## {name}", "", summary, "", "```{raw} html")
    yield from (f'<pre class="help" tabindex="0" aria-label="Help of memjax.{name}">{shown}</pre>', "```", "")


def _escaped(text: str) -> str:
    """Plain text as Markdown; what stands between backticks is code there, too."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_<\[\]\\])", r"\\\1", part) for i, part in enumerate(parts))
