"""Charts of the site: points joined by lines, and bars. Each names its values, so that it can be read without axes."""

import dataclasses
import math

from svg import line, picture, rect, text


@dataclasses.dataclass(frozen=True)
class Point:
    """A mean with the lowest and the highest of its runs."""

    x: float
    low: float
    mean: float
    high: float
    label: str
    side: str = "right"
    """Where the label stands: `right`, `left`, `above` or `below`."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar; `low` and `high` are the range of several runs."""

    label: str
    value: float
    color: str
    words: str
    low: float | None = None
    high: float | None = None


def curve(
    title: str,
    lines: dict[str, list[Point]],
    *,
    x: tuple[str, float, float, dict[float, str]],
    y: tuple[str, float, dict[float, str]],
) -> str:
    """Points by colour over a logarithmic x (label, lowest, highest, ticks) and y from zero (label, highest, ticks)."""
    left, top, width, height = 46, 26, 386, 230
    x_label, x_low, x_high, x_ticks = x
    y_label, y_high, y_ticks = y

    def place(at: float, value: float) -> tuple[float, float]:
        share = math.log(at / x_low) / math.log(x_high / x_low)
        return left + width * share, top + height * (1 - value / y_high)

    parts = [text(left, 14, y_label, opacity=0.75)]
    for value, name in y_ticks.items():
        _, level = place(x_low, value)
        parts += [
            line([(left, level), (left + width, level)], opacity=0.15),
            text(left - 6, level + 4, name, anchor="end", opacity=0.75),
        ]
    for value, name in x_ticks.items():
        parts.append(text(place(value, 0)[0], top + height + 18, name, anchor="middle", opacity=0.75))
    parts.append(text(left + width / 2, top + height + 38, x_label, anchor="middle", opacity=0.75))
    shifts = {"right": (9, 4, "start"), "left": (-9, 4, "end"), "above": (6, -12, "end"), "below": (9, 16, "start")}
    for color, points in lines.items():
        parts.append(line([place(point.x, point.mean) for point in points], color, width=2))
        for point in points:
            here, (right, down, anchor) = place(point.x, point.mean), shifts[point.side]
            parts += [
                line([place(point.x, point.low), place(point.x, point.high)], color, width=1.6),
                f'<circle cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="4.5" fill="{color}"/>',
                text(round(here[0] + right, 1), round(here[1] + down, 1), point.label, anchor=anchor),
            ]
    return picture(title, 440, 306, parts, size="narrow")


def bars(title: str, groups: dict[str, list[Bar]], *, highest: float | None = None) -> str:
    """Horizontal bars in groups with a heading each, to the scale of `highest`, or of each group's own longest."""
    labels, width, row, top, parts = 218, 182, 22, 0.0, []
    for heading, members in groups.items():
        if heading:
            top += 24
            parts.append(text(0, top - 7, heading, bold=True))
        longest = highest or max(bar.value for bar in members)
        for bar in members:
            end, middle = labels + width * bar.value / longest, top + row / 2
            parts += [
                text(labels - 8, middle + 4, bar.label, anchor="end"),
                rect(labels, top + 3, end - labels, row - 6, bar.color, 0.85),
            ]
            if bar.low is not None and bar.high is not None:
                ends = [labels + width * value / longest for value in (bar.low, bar.high)]
                parts.append(line([(ends[0], middle), (ends[1], middle)], width=1.5))
                end = max(end, ends[1])
            parts.append(text(round(end + 6, 1), middle + 4, bar.words))
            top += row
        top += 8
    return picture(title, 480, top, parts, size="narrow")
