"""Checks of single settings, for the `__post_init__` of configs.

A check is a list of problems in words, each beginning with `field=value`; None stands where all is well.
"""


def refuse(problems: list[str | None]) -> None:
    """Raises one ValueError with every problem on a line of its own; does nothing when there is none."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


def positive(**fields: int | float | None) -> list[str | None]:
    """Fields must be above 0, or null."""
    return [f"{name}={value} must be positive" for name, value in fields.items() if value is not None and value <= 0]


def not_empty(**fields: str | None) -> list[str | None]:
    """Texts must not be empty; they may be null."""
    return [f"{name}={value!r} must not be empty" for name, value in fields.items() if value is not None and not value]


def not_negative(**fields: int | float | None) -> list[str | None]:
    """Fields must be 0 or above, or null."""
    return [f"{name}={value} must not be negative" for name, value in fields.items() if value is not None and value < 0]
