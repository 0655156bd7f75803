"""Elements of the pictures of the site. Lines and letters take the colour of the page, in light and in dark mode."""

import html

BLUE, ORANGE, GREEN = "#3d7edb", "#d9772b", "#2a9d63"
"""Colours that stand out from a light and from a dark page."""


def picture(title: str, width: float, height: float, parts: list[str], *, size: str = "wide") -> str:
    """The parts as one picture; `title` is what screen readers say, `size` the class that the style sheet knows."""
    head = (
        f'<svg class="picture-{size}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html.escape(title)}" fill="currentColor" font-family="system-ui, sans-serif" font-size="12.5">'
        f"<title>{html.escape(title)}</title>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return f'<div class="picture">{head}{"".join(parts)}</svg></div>'


def box(x: float, y: float, width: float, height: float, label: str, color: str = "currentColor") -> str:
    """A rectangle with round corners and a label in its middle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{color}" fill-opacity="0.12" '
        f'stroke="{color}"/>{text(x + width / 2, y + height / 2 + 4.5, label, anchor="middle")}'
    )


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow."""
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="currentColor" fill="none" marker-end="url(#tip)"/>'


def line(
    points: list[tuple[float, float]], color: str = "currentColor", *, opacity: float = 1, width: float = 1
) -> str:
    """A line through points."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" stroke="{color}" stroke-opacity="{opacity}" stroke-width="{width}" fill="none"/>'


def text(
    x: float, y: float, words: str, *, anchor: str = "start", opacity: float = 1, bold: bool = False, size: float = 0
) -> str:
    """Words at a place, in the colour of the page."""
    style = (f' font-size="{size:g}"' if size else "") + (' font-weight="600"' if bold else "")
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill-opacity="{opacity}"{style}>{html.escape(words)}</text>'
    )
