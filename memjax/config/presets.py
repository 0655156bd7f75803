"""The configs shipped with memjax, by name: `wiki_text` is configs/wiki_text.yaml of a checkout or of the wheel."""

from pathlib import Path

RECIPE = "paper"
"""The base of the presets of the paper's models; no model of its own."""

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where they are: inside an installed package, next to it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(word: str | Path) -> Path | None:
    """The file of a preset; None for what is no preset's name, with or without .yaml."""
    name = str(word).removesuffix(".yaml")
    return folder() / f"{name}.yaml" if name in names() else None
