"""The base class of all settings, and types that give fields a range: `steps: Positive[int] = 750`."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from memjax.config import checks

Value = TypeVar("Value")

Positive = Annotated[Value, checks.positive]
NotNegative = Annotated[Value, checks.not_negative]
NotEmpty = Annotated[Value, checks.not_empty]
Share = Annotated[Value, checks.share]
"""From 0 to 1."""
BelowOne = Annotated[Value, checks.below_one]
"""From 0 to below 1."""
LocalPath = Annotated[Value, checks.local]
"""A local path, or several; `~` is expanded."""
PathOrAddress = Annotated[Value, checks.local_or_remote]
"""The same, or an address such as gs://bucket/run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Settings, checked on construction: the types of fields, then their ranges and `problems`."""

    PLACE: ClassVar[str | None] = None
    """The section's path in a run's config, to recognise renamed values."""

    def __post_init__(self) -> None:
        checks.plain_values(self)
        checks.typed(self, self.PLACE)
        problems = checks.ranges(self)
        checks.expand_home(self)
        checks.refuse([*problems, *self.problems()])

    def problems(self) -> Iterable[str]:
        """Further problems, each beginning with `field=value`."""
        return ()


Settings = TypeVar("Settings", bound=Section)


def replaced(config: Settings, changes: Mapping[str, Any]) -> Settings:
    """The config with settings changed by dotted name, all at once, since some are only valid together."""
    own: dict[str, Any] = {}
    of_sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, dot, rest = name.partition(".")
        if dot:
            of_sections.setdefault(section, {})[rest] = value
        else:
            own[name] = value
    sections = {name: replaced(getattr(config, name), inner) for name, inner in of_sections.items()}
    return dataclasses.replace(config, **own, **sections)


def with_settings(owner: type, config: Settings, settings: Mapping[str, Any]) -> Settings:
    """The settings of a layer: a section with fields replaced by keyword arguments.

    Raises:
        TypeError: there is no such field, or config is not a section.
        ValueError: a value is out of range.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{owner.__name__}: config={config!r} must be an object with settings, as MemoryConfig()")
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"{owner.__name__} has no setting {', '.join(unknown)}; known: {', '.join(known)}")
    return dataclasses.replace(config, **settings)
