"""Each package imports only from lower levels, and there are no import cycles."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "memjax"

LEVELS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"errors"},
            {"io"},
            {"config"},
            {"ops"},
            {"sharding", "monitoring"},
            {"checkpoint", "memory", "data"},
            {"models"},
            {"inference", "runs"},
            {"evaluation", "interop"},
            {"training"},
            {"knowledge"},
        ),
    )
)
"""Packages (and `errors`), the lowest level first; packages of one level do not import each other."""
WITHOUT_JAX = ("errors", "io", "config")
"""These do not import JAX, since invalid settings are refused before it is imported."""
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "tokenizers"}
NO_COMMANDS = {"__init__", "__main__", "errors"}
"""Top-level modules that are not commands."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yields every module but the package itself, with its dotted name below memjax."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def imported(name: str, *, at_start: bool = False) -> set[str]:
    """Modules of memjax that a module imports, including in functions and for types unless `at_start`."""
    found = set()
    for node in MODULES[name].body if at_start else ast.walk(MODULES[name]):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for dotted in names:
            top, _, inside = dotted.partition(".")
            if top == "memjax" and inside:
                # The imported name may be a module or something inside one.
                found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found - {"", name}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def level_of(module: str) -> int:
    """The level of a module; commands are above all others."""
    return next((number for number, level in enumerate(LEVELS) if package_of(module) in level), len(LEVELS))


def is_allowed(importer: str, other: str) -> bool:
    return package_of(importer) == package_of(other) or level_of(other) < level_of(importer)


@pytest.mark.parametrize("package", sorted({package_of(name) for name in MODULES}))
def test_a_package_imports_only_from_lower_levels(package):
    upward = [
        f"{importer} imports {other}"
        for importer in MODULES
        if package_of(importer) == package
        for other in sorted(imported(importer))
        if not is_allowed(importer, other)
    ]
    assert upward == []


def test_there_are_no_import_cycles():
    # Imports in functions do not count: tokenizers import modules of other kinds only on demand, for their libraries.
    graph = {name: imported(name, at_start=True) & MODULES.keys() for name in MODULES}
    # Repeatedly remove modules that import none of the rest; any that remain are in a cycle or depend on one.
    while free := [name for name, others in graph.items() if not others]:
        for name in free:
            del graph[name]
        graph = {name: others & graph.keys() for name, others in graph.items()}
    assert graph == {}


def test_every_package_has_a_level():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages <= frozenset().union(*LEVELS)


def test_the_top_level_holds_only_commands():
    commands = [path for path in PACKAGE.glob("*.py") if path.stem not in NO_COMMANDS]
    assert commands
    for path in commands:
        assert "main" in {node.name for node in MODULES[path.stem].body if isinstance(node, ast.FunctionDef)}, path.name


@pytest.mark.parametrize("package", WITHOUT_JAX)
def test_settings_need_no_jax_when_they_are_imported(package):
    for name in MODULES:
        if package_of(name) == package:
            tops = {
                (alias.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
                for node in MODULES[name].body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not tops & HEAVY, name


def test_layouts_are_spelled_in_the_sharding_package_alone():
    spelling = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "PartitionSpec" for alias in node.names)
    }
    assert {name.split(".")[0] for name in spelling} == {"sharding"}
