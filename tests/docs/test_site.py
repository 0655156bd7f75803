"""The pages' references to settings, commands, names and each other are right. The site is built by .ci/run."""

import ast
import dataclasses
import importlib
import importlib.util
import itertools
import pathlib
import re
import types
import typing
import xml.etree.ElementTree

import pytest

import memjax
from memjax.__main__ import COMMANDS
from memjax.config.run import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = ("run", "model", "memory", "data", "optim", "devices", "training", "log")
"""Modules of memjax/config that hold the settings of a run."""
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture
def generated(monkeypatch):
    """The module that generates parts of the pages from the code."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generated")


@pytest.fixture
def figure(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("figure")


def settings(section: type, prefix: str = "") -> dict[str, typing.Any]:
    """Every setting with its default, including optional sections themselves and the fields of list items."""
    found, hints = {}, typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = [member for member in members if dataclasses.is_dataclass(member)]
        items = [item for item in typing.get_args(hint) if typing.get_origin(hint) is tuple]
        if not inner or len(members) > 1:
            found[prefix + field.name] = field.default
        if inner:
            found |= settings(typing.cast(type, inner[0]), f"{prefix}{field.name}.")
        elif items and dataclasses.is_dataclass(items[0]):
            found |= settings(typing.cast(type, items[0]), f"{prefix}{field.name}[].")
    return found


def plain(text: str) -> str:
    return " ".join(text.replace("\\", "").split())


def test_every_setting_is_in_the_reference_with_its_docstring(generated):
    reference = generated.fill_in((DOCS / "configuration.md").read_text())
    names = settings(RunConfig)
    assert len(names) > 60
    assert set(re.findall(r"```{confval} (\S+)\n", reference)) == set(names)
    # In the source, a bare string below a field documents it; sections are documented by their class docstring.
    sources = [(ROOT / f"memjax/config/{name}.py").read_text() for name in SECTIONS]
    # Sampling is not part of a run; schedules and lookups share fields whose docstrings are partly overridden.
    others = ("ScheduleConfig", "LookupConfig", "ProductKeyConfig", "TableSizes", "SamplingConfig", "RunConfig")
    for node in itertools.chain(*(ast.parse(source).body for source in sources)):
        if isinstance(node, ast.ClassDef) and node.name not in others:
            for field, below in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                    assert isinstance(below, ast.Expr)
                    assert plain(ast.literal_eval(below.value)) in plain(reference)
    assert reference.count("Final steps of a wsd schedule, over which the rate falls") == 2


def test_types_and_defaults_in_the_reference_are_those_of_the_config(generated):
    reference = generated.settings()
    for name, kind, default in [
        ("model.dim", "INT", "64"),
        ("model.memory.layers", "INT,...", "[1, 2]"),
        ("model.memory.gate", "none | silu", "'silu'"),
        ("optim.max_grad_norm", "NUMBER | null", "1.0"),
        ("data.path", "TEXT | null", "null"),
        ("checkpoint.keep_best", "BOOL", "true"),
    ]:
        assert f"```{{confval}} {name}\n:type: `{kind}`\n:default: `{default}`\n" in reference


def test_a_new_setting_appears_by_itself(generated, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Extended:
        """A config of a later version."""

        added: int = 7
        """What it adds_to <all>."""

    monkeypatch.setattr(generated, "RunConfig", Extended)
    assert "{confval} added\n:type: `INT`\n:default: `7`\n\nWhat it adds\\_to \\<all>.\n" in generated.settings()


def test_a_mark_that_names_nothing_is_refused(generated):
    with pytest.raises(KeyError, match="setings"):
        generated.fill_in("# Title\n\n<!-- generated: setings -->\n")


def test_every_command_is_shown_with_its_help(generated):
    page = generated.fill_in((DOCS / "command_lines.md").read_text())
    runnable = {path.stem for path in (ROOT / "memjax").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert set(COMMANDS) == runnable - {"__main__"}
    for name in COMMANDS:
        assert f"## {name}\n" in page
        assert f"usage: python -m memjax.{name}" in page
    assert "--allow_changed" in page
    assert "--memory_devices" in page


def test_every_public_name_is_in_the_api_reference():
    shown = re.findall(r"\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(memjax.__all__) - {"__version__"})


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path, generated):
    text = generated.fill_in(path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"{download}`[^<]+<([^>]+)>`", text):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            other = (path.parent / name).resolve() if name else path
            assert other.is_file(), f"{path.name}: {target} is not there"
            assert not anchor or anchor in anchors(generated.fill_in(other.read_text())), f"{path.name}: {target}"
    known = set(settings(RunConfig))
    assert set(re.findall(r"{confval}`([^`]+)`", text)) <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_in_links_to_code_exist(path):
    for name, target in re.findall(r"\[`([\w.]+)`\]\((\.\./[\w/]+\.py)\)", path.read_text()):
        file = path.parent / target
        if name != file.name:
            assert name in defined(ast.parse(file.read_text()).body), f"{path.name}: {target} has no {name}"


def defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Collects functions, classes, their members and assigned names, as dotted names."""
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(prefix + node.name)
            found |= defined(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else set()
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def anchors(text: str) -> set[str]:
    """Collects the valid link anchors: slugs of headings, and explicit labels."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))


def test_every_page_is_in_the_contents_and_says_its_purpose():
    contents = "\n".join(re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL))
    assert sorted(re.findall(r"^\w+$", contents, re.MULTILINE)) == sorted({path.stem for path in PAGES} - {"index"})
    for path in PAGES:
        if path.stem not in ("index", "changelog"):
            assert re.match(r"# .+\n\nAfter this page you ", path.read_text()), path.name


def test_the_picture_shows_the_best_slots(figure):
    count = range(len(figure.LEFT))
    scores = {(i, j): figure.LEFT[i] + figure.RIGHT[j] for i in count for j in count}
    best = sorted(scores, key=lambda slot: scores[slot], reverse=True)[: figure.TOP_K]
    assert figure.read_slots() == best
    assert scores[best[-1]] > sorted(scores.values(), reverse=True)[figure.TOP_K], "a tie would leave the choice open"


def test_the_letters_of_the_picture_take_the_colour_of_the_page(figure):
    picture = xml.etree.ElementTree.fromstring(figure.memory_layer())
    (svg,) = picture
    assert svg.attrib["fill"] == "currentColor"
    letters = [element for element in svg.iter() if element.tag.endswith("text")]
    assert len(letters) > 10
    assert all("fill" not in element.attrib for element in letters)


def test_the_picture_of_the_packages_shows_the_levels_that_are_tested(figure):
    spec = importlib.util.spec_from_file_location("levels", ROOT / "tests" / "test_package_levels.py")
    assert spec is not None
    assert spec.loader is not None
    tested = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tested)
    assert figure.LEVELS[0].keys() == {"commands"}
    assert tuple(frozenset(level) for level in reversed(figure.LEVELS[1:])) == tested.LEVELS
    (svg,) = xml.etree.ElementTree.fromstring(figure.levels())
    letters = "".join(svg.itertext())
    assert all(name in letters and words in letters for level in figure.LEVELS for name, words in level.items())
