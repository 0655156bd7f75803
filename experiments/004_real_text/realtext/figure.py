"""The figure: loss against tokens and arithmetic, and facts known by how often the text states them."""

import pathlib
from statistics import fmean
from typing import Any

from factlab.report import draw

from realtext.measures import DENSE, NAMES, Families, bits, nats
from realtext.prepare import BINS

COLORS = {"dense": "#4d4d4d", "moe": "#2ca02c", "peer": "#9467bd", "memory": "#1f77b4", "memory_plus": "#d62728"}
"""Colours by kind of block; markers distinguish sizes."""
FIRST_SHOWN = 0.35
"""Losses are shown from this share of the tokens on: before, the fall of the curves hides their differences."""


def figure(families: Families, path: pathlib.Path) -> None:
    """Draws held-out loss against tokens and against arithmetic, and the loss of facts by exposures."""
    by_tokens: dict[str, list[tuple[Any, Any]]] = {}
    by_flops: dict[str, list[tuple[Any, Any]]] = {}
    by_bin: dict[str, list[tuple[Any, Any]]] = {}
    for name, runs in families.items():
        points = list(zip(*[run["curve"] for run in runs], strict=True))
        by_tokens[NAMES[name]] = [
            (each[0]["tokens"], [point["bits_per_byte"]["held_out"] for point in each])
            for each in points
            if each[0]["tokens"] >= FIRST_SHOWN * points[-1][0]["tokens"]
        ]
        by_flops[NAMES[name]] = [(points[-1][0]["flops"], [bits("held_out")(run) for run in runs])]
        if "dense_x1" in families:
            by_bin[NAMES[name]] = [
                (
                    one.replace(", ", ",\n").replace(" paragraphs", "\nparagraphs"),
                    [nats(one)(run) - fmean(map(nats(one), families["dense_x1"])) for run in runs],
                )
                for one in BINS
                if one in runs[0]["written"]
            ]
    # The dense models are one series; its line is drawn below the points.
    dense = [point for name in DENSE if name in families for point in by_flops[NAMES[name]]]
    panels = [
        ("Held-out articles", "bits per byte", by_tokens),
        ("Held-out articles, at the end", "bits per byte", {"_dense": dense, **by_flops}),
        ("Facts, by how often the text states them", "nats of the answer, relative to the first model", by_bin),
    ]
    styles = {NAMES[name]: style(name) for name in families}
    styles["_dense"] = {"color": COLORS["dense"], "marker": "none", "capsize": 0, "alpha": 0.5}
    draw(path, panels, ("tokens", "training FLOPs", "subject and object together"), styles)


def style(name: str) -> dict[str, Any]:
    """Colour by kind of block, marker and line style by size."""
    kind = max((kind for kind in COLORS if kind in name), key=len)
    marker = "v" if "small" in name else "^" if "large" in name or name.endswith("x2") else "o"
    large = name.startswith("134m")
    return {
        "color": COLORS[kind],
        "marker": marker,
        "markersize": 6 if large else 4,
        "markerfacecolor": COLORS[kind] if large else "white",
        "linestyle": "-" if large else "--",
    }
