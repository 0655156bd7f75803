"""Numbers formatted with units for people to read, and lists of them."""

from collections.abc import Iterable


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values in two columns, one pair per line."""
    return "\n".join(f"{name:<27} {value}" for name, value in rows)


def billions(count: int) -> str:
    """A count in billions or millions."""
    return f"{count / 1e9:.3f} b" if count >= 1e8 else f"{count / 1e6:.3f} m"


def gigabytes(count: int) -> str:
    """Bytes in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
