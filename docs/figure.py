"""The pictures of the pages: a memory layer, from an example that is really computed, and the floors of the packages.

`python docs/figure.py > picture.svg` writes the memory layer. Lines and letters take the colour of the page's text, so
that pictures can be read in light and in dark mode; the three colours for the two halves and the rows that are read
stand out from both.
"""

import html

FIRST, SECOND, READ = "#3d7edb", "#d9772b", "#2a9d63"
LEFT = (0.3, 0.9, 0.2, 0.5, 0.75, 0.1, 0.4, 0.25)
"""Scores of the sub-keys for the first half of the query."""
RIGHT = (0.15, 0.35, 0.8, 0.2, 0.45, 0.7, 0.1, 0.3)
"""Scores of the sub-keys for the second half."""
TOP_K = 3
CELL = 20
"""Width of a slot in the grid."""
GRID_X, GRID_Y = 76, 196
FLOORS: tuple[dict[str, str], ...] = (
    {"commands": "train, evaluate, serve, learn, ...: the only modules at the top"},
    {"knowledge": "what slots hold, sparse finetuning, the page of inspect"},
    {"training": "the loop, the step, optimizers, hooks, the planner"},
    {
        "evaluation": "recall, perplexity, question sets, lm-eval",
        "interop": "Hugging Face, the official checkpoints, up-cycling",
    },
    {
        "inference": "the engine, sampling, scoring, the server",
        "runs": "a run's folder, loading, patches, quantized tables",
    },
    {"models": "the decoder, its blocks, attention, experts, the loss"},
    {
        "memory": "tables, product keys, lookups, reads, row optimizer",
        "data": "sources, tokenizers, packing, the loader",
        "checkpoint": "saving, restoring, the index, digests",
    },
    {
        "sharding": "the mesh, logical axes, processes",
        "monitoring": "metrics, trackers, progress, plots, profiles",
    },
    {"ops": "search, bag, dot, row update and others; row formats"},
    {"config": "every setting, and how it is read; no JAX"},
    {"io": "atomic files, locks, paths, the console"},
    {"errors": "ConfigError, DataError, CheckpointError"},
)
"""The packages from the highest to the lowest, with what is in them; those of one floor do not import each other."""
TABLE_X, TABLE_Y, TABLE_WIDTH, ROW = 372, 62, 190, 13


def best(scores: tuple[float, ...]) -> list[int]:
    """The numbers of the TOP_K highest scores, best first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:TOP_K]


def read_slots() -> list[tuple[int, int]]:
    """The TOP_K best slots (i, j) by LEFT[i] + RIGHT[j], found among the best of each half."""
    candidates = [(i, j) for i in best(LEFT) for j in best(RIGHT)]
    return sorted(candidates, key=lambda slot: -LEFT[slot[0]] - RIGHT[slot[1]])[:TOP_K]


def memory_layer() -> str:
    """The whole picture as an SVG element."""
    title = "A memory layer: product keys choose a few rows of a table, their weighted sum is gated and returned"
    parts = [
        '<svg class="memory-layer" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 482" role="img" '
        f'aria-label="{title}" fill="currentColor" font-family="system-ui, sans-serif" font-size="12.5">',
        f"<title>{title}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
        *_query(),
        *_grid(),
        *_table(),
        *_output(),
        "</svg>",
    ]
    return f'<div class="picture">{"".join(parts)}</div>'


def floors() -> str:
    """The packages one above the other as an SVG element."""
    row, gap, top, parts = 24, 8, 0, []
    for floor in FLOORS:
        height = row * len(floor) + 6
        parts.append(_rect(0, top, 640, height, "currentColor", 0.07))
        for number, (name, words) in enumerate(floor.items()):
            y = top + 3 + row * number
            parts += [_box(6, y + 2, 112, row - 4, name, READ), _text(132, y + 16, words)]
        top += height + gap
    title = "The packages of memjax, each above those that it may import"
    head = (
        f'<svg class="memory-layer" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {top}" role="img" '
        f'aria-label="{title}" fill="currentColor" font-family="system-ui, sans-serif" font-size="12.5">'
    )
    return f'<div class="picture">{head}<title>{title}</title>{"".join(parts)}</svg></div>'


def _query() -> list[str]:
    x, width = GRID_X, CELL * len(RIGHT)
    half = width / 2
    return [
        _box(x, 10, width, 28, "x, one token"),
        _arrow(x + half, 38, x + half, 66),
        _text(x + half + 8, 56, "linear"),
        _box(x, 66, half, 28, "first half", FIRST),
        _box(x + half, 66, half, 28, "second half", SECOND),
        _text(x + half, 112, "the query, key_dim wide, for each head", anchor="middle"),
    ]


def _grid() -> list[str]:
    """All slots as crossings of the two halves' sub-keys, the candidates and the slots that are read."""
    parts, slots, count = [], read_slots(), len(LEFT)
    for i, score in enumerate(LEFT):
        fill = FIRST if i in best(LEFT) else "currentColor"
        y = GRID_Y + CELL * i + 4
        parts.append(_rect(GRID_X - 8 - 44 * score, y, 44 * score, CELL - 8, fill, 0.9 if i in best(LEFT) else 0.25))
    for j, score in enumerate(RIGHT):
        fill = SECOND if j in best(RIGHT) else "currentColor"
        x = GRID_X + CELL * j + 4
        parts.append(_rect(x, GRID_Y - 8 - 44 * score, CELL - 8, 44 * score, fill, 0.9 if j in best(RIGHT) else 0.25))
    for i in range(count):
        for j in range(count):
            x, y = GRID_X + CELL * j, GRID_Y + CELL * i
            if (i, j) in slots:
                parts.append(_rect(x + 1, y + 1, CELL - 2, CELL - 2, READ, 1))
            elif i in best(LEFT) and j in best(RIGHT):
                parts.append(_rect(x + 1, y + 1, CELL - 2, CELL - 2, READ, 0.28))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="none" stroke="currentColor" '
                'stroke-opacity="0.25" stroke-width="0.8"/>'
            )
    middle, below = GRID_X + CELL * count / 2, GRID_Y + CELL * count
    return [
        *parts,
        _text(GRID_X - 8, GRID_Y - 10, "scores", anchor="end"),
        _text(middle, below + 20, "num_keys sub-keys a side, num_keys² slots", anchor="middle"),
        _rect(GRID_X - 40, below + 34, 12, 12, READ, 0.28),
        _text(GRID_X - 22, below + 44, "top_k best of each side: top_k² candidates"),
        _rect(GRID_X - 40, below + 54, 12, 12, READ, 1),
        _text(GRID_X - 22, below + 64, "the top_k best of all slots: these are read"),
    ]


def _table() -> list[str]:
    """The table, the rows that are read and the other layers that read it."""
    rows, marked = 16, (3, 8, 12)
    height = rows * ROW
    parts = []
    for row in range(rows):
        read = row in marked
        parts.append(
            _rect(
                TABLE_X,
                TABLE_Y + ROW * row + 1,
                TABLE_WIDTH,
                ROW - 2,
                READ if read else "currentColor",
                1 if read else 0.1,
            )
        )
    for slot, row in zip(sorted(read_slots()), marked, strict=True):
        x, y = GRID_X + CELL * (slot[1] + 1), GRID_Y + CELL * (slot[0] + 0.5)
        end = TABLE_Y + ROW * (row + 0.5)
        parts.append(
            f'<path d="M{x} {y}C{x + 70} {y} {TABLE_X - 70} {end} {TABLE_X - 4} {end}" fill="none" stroke="{READ}" '
            'stroke-width="1.6"/>'
        )
    middle = TABLE_X + TABLE_WIDTH / 2
    return [
        *parts,
        _text(middle, 20, "the table: num_slots × value_dim", anchor="middle"),
        _text(TABLE_X + TABLE_WIDTH / 4, 50, "device 0", anchor="middle", opacity=0.75),
        _text(TABLE_X + TABLE_WIDTH * 3 / 4, 50, "device 1", anchor="middle", opacity=0.75),
        f'<path d="M{middle} 38V{TABLE_Y + height + 4}" stroke="currentColor" stroke-dasharray="4 4" fill="none"/>',
        f'<path d="M632 {TABLE_Y + 92}H{TABLE_X + TABLE_WIDTH + 6}" stroke="currentColor" stroke-dasharray="4 4" '
        'fill="none" marker-end="url(#tip)"/>',
        _text(TABLE_X + TABLE_WIDTH + 10, TABLE_Y + 66, "other"),
        _text(TABLE_X + TABLE_WIDTH + 10, TABLE_Y + 82, "layers"),
    ]


def _output() -> list[str]:
    middle, below = TABLE_X + TABLE_WIDTH / 2, TABLE_Y + 16 * ROW
    return [
        _arrow(middle, below + 6, middle, below + 34),
        _box(TABLE_X, below + 34, TABLE_WIDTH, 28, "sum of weight × row", READ),
        _text(middle, below + 79, "weights: softmax of the scores", anchor="middle"),
        _arrow(middle, below + 86, middle, below + 112),
        _box(TABLE_X, below + 112, TABLE_WIDTH, 28, "gate: W2 (… × silu(W1 x))"),
        _arrow(middle, below + 140, middle, below + 166),
        _text(middle, below + 182, "y, in place of the feed-forward layer's", anchor="middle"),
        _text(middle, below + 198, "output; the heads add up", anchor="middle"),
    ]


def _box(x: float, y: float, width: float, height: float, label: str, color: str = "currentColor") -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{color}" fill-opacity="0.12" '
        f'stroke="{color}"/>{_text(x + width / 2, y + height / 2 + 4.5, label, anchor="middle")}'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, opacity: float) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="currentColor" fill="none" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", opacity: float = 1) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill-opacity="{opacity}">{html.escape(text)}</text>'


if __name__ == "__main__":
    print(memory_layer())
