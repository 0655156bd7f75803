"""The configs shipped with memjax, by name: `wiki_text` is configs/wiki_text.yaml in a checkout or a wheel."""

from pathlib import Path

RECIPE = "paper"
"""The base of the presets of the paper's models; not a model itself."""

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """The folder of the presets: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """All names, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(word: str | Path) -> Path | None:
    """The file of a preset, named with or without .yaml; None if there is no such preset."""
    name = str(word).removesuffix(".yaml")
    return folder() / f"{name}.yaml" if name in names() else None
