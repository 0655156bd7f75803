"""The drawings of the pages: a block with its table, a memory layer, from an example that is really computed, and the
levels of the packages.

`python docs/figure.py > picture.svg` writes the memory layer. Lines and letters take the colour of the page's text, so
that pictures can be read in light and in dark mode; the three colours for the two halves and the rows that are read
stand out from both.
"""

from svg import BLUE, GREEN, ORANGE, arrow, box, picture, rect, text

FIRST, SECOND, READ = BLUE, ORANGE, GREEN
LEFT = (0.3, 0.9, 0.2, 0.5, 0.75, 0.1, 0.4, 0.25)
"""Scores of the sub-keys for the first half of the query."""
RIGHT = (0.15, 0.35, 0.8, 0.2, 0.45, 0.7, 0.1, 0.3)
"""Scores of the sub-keys for the second half."""
TOP_K = 3
CELL = 20
"""Width of a slot in the grid."""
GRID_X, GRID_Y = 76, 196
LEVELS: tuple[dict[str, str], ...] = (
    {"commands": "train, evaluate, serve, learn, ...: the only modules at the top"},
    {"knowledge": "what slots hold, sparse finetuning, the page of inspect"},
    {"training": "the loop, the step, optimizers, hooks, the planner"},
    {
        "evaluation": "recall, perplexity, question sets, lm-eval",
        "interop": "Hugging Face, official checkpoints, upcycling",
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
"""The packages from the highest to the lowest, with what is in them; those of one level do not import each other."""
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
    return picture(title, 640, 482, [*_query(), *_grid(), *_table(), *_output()])


def block() -> str:
    """A transformer block whose feed-forward layer is a memory, with the table beside it."""
    left, width, top, row, rows = 12, 172, 20, 15, 15
    middle, table_x, table_width = left + width / 2, 262, 176
    memory_y, read = top + 76, (2, 6, 11)
    parts = [
        rect(left - 10, top + 8, width + 20, 222, "currentColor", 0.06),
        text(left - 4, top, "a transformer block", opacity=0.75),
        arrow(middle, top + 262, middle, top + 212),
        text(middle, top + 278, "token", anchor="middle"),
        box(left, top + 176, width, 34, "attention"),
        arrow(middle, top + 176, middle, memory_y + 58),
        box(left, memory_y, width, 56, "", GREEN),
        text(middle, memory_y + 25, "memory layer", anchor="middle", bold=True),
        text(middle, memory_y + 43, "in place of feed-forward", anchor="middle", opacity=0.75),
        arrow(middle, memory_y, middle, top + 14),
        text(table_x, top, "a table of millions of rows"),
    ]
    for number in range(rows):
        fill, opacity = (GREEN, 1) if number in read else ("currentColor", 0.12)
        parts.append(rect(table_x, top + 10 + row * number, table_width, row - 3, fill, opacity))
    for number in read:
        end, start = top + 16 + row * number, memory_y + 28
        edge = left + width
        parts.append(
            f'<path d="M{edge} {start}C{edge + 60} {start} {table_x - 60} {end} {table_x - 5} {end}" fill="none" '
            f'stroke="{GREEN}" stroke-width="1.8"/>'
        )
    parts += [
        text(table_x, top + 254, "a token reads a few rows;"),
        text(table_x, top + 271, "training writes only these"),
    ]
    title = (
        "A transformer block whose memory layer, in place of the feed-forward layer, reads three rows of a large table"
    )
    return picture(title, 440, 306, parts, size="narrow")


def levels() -> str:
    """The packages one above the other as an SVG element."""
    row, gap, top, parts = 24, 8, 0, []
    for level in LEVELS:
        height = row * len(level) + 6
        parts.append(rect(0, top, 640, height, "currentColor", 0.07))
        for number, (name, words) in enumerate(level.items()):
            y = top + 3 + row * number
            parts += [box(6, y + 2, 112, row - 4, name, READ), text(132, y + 16, words)]
        top += height + gap
    return picture("The packages of memjax, each above those that it may import", 640, top, parts)


def _query() -> list[str]:
    x, width = GRID_X, CELL * len(RIGHT)
    half = width / 2
    return [
        box(x, 10, width, 28, "x, one token"),
        arrow(x + half, 38, x + half, 66),
        text(x + half + 8, 56, "linear"),
        box(x, 66, half, 28, "first half", FIRST),
        box(x + half, 66, half, 28, "second half", SECOND),
        text(x + half, 112, "the query, key_dim wide, for each head", anchor="middle"),
    ]


def _grid() -> list[str]:
    """All slots as crossings of the two halves' sub-keys, the candidates and the slots that are read."""
    parts, slots, count = [], read_slots(), len(LEFT)
    for i, score in enumerate(LEFT):
        fill = FIRST if i in best(LEFT) else "currentColor"
        y = GRID_Y + CELL * i + 4
        parts.append(rect(GRID_X - 8 - 44 * score, y, 44 * score, CELL - 8, fill, 0.9 if i in best(LEFT) else 0.25))
    for j, score in enumerate(RIGHT):
        fill = SECOND if j in best(RIGHT) else "currentColor"
        x = GRID_X + CELL * j + 4
        parts.append(rect(x, GRID_Y - 8 - 44 * score, CELL - 8, 44 * score, fill, 0.9 if j in best(RIGHT) else 0.25))
    for i in range(count):
        for j in range(count):
            x, y = GRID_X + CELL * j, GRID_Y + CELL * i
            if (i, j) in slots:
                parts.append(rect(x + 1, y + 1, CELL - 2, CELL - 2, READ, 1))
            elif i in best(LEFT) and j in best(RIGHT):
                parts.append(rect(x + 1, y + 1, CELL - 2, CELL - 2, READ, 0.28))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="none" stroke="currentColor" '
                'stroke-opacity="0.25" stroke-width="0.8"/>'
            )
    middle, below = GRID_X + CELL * count / 2, GRID_Y + CELL * count
    return [
        *parts,
        text(GRID_X - 8, GRID_Y - 10, "scores", anchor="end"),
        text(middle, below + 20, "num_keys sub-keys a side, num_keys² slots", anchor="middle"),
        rect(GRID_X - 40, below + 34, 12, 12, READ, 0.28),
        text(GRID_X - 22, below + 44, "top_k best of each side: top_k² candidates"),
        rect(GRID_X - 40, below + 54, 12, 12, READ, 1),
        text(GRID_X - 22, below + 64, "the top_k best of all slots: these are read"),
    ]


def _table() -> list[str]:
    """The table, the rows that are read and the other layers that read it."""
    rows, marked = 16, (3, 8, 12)
    height = rows * ROW
    parts = []
    for row in range(rows):
        read = row in marked
        parts.append(
            rect(
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
        text(middle, 20, "the table: num_slots × value_dim", anchor="middle"),
        text(TABLE_X + TABLE_WIDTH / 4, 50, "device 0", anchor="middle", opacity=0.75),
        text(TABLE_X + TABLE_WIDTH * 3 / 4, 50, "device 1", anchor="middle", opacity=0.75),
        f'<path d="M{middle} 38V{TABLE_Y + height + 4}" stroke="currentColor" stroke-dasharray="4 4" fill="none"/>',
        f'<path d="M632 {TABLE_Y + 92}H{TABLE_X + TABLE_WIDTH + 6}" stroke="currentColor" stroke-dasharray="4 4" '
        'fill="none" marker-end="url(#tip)"/>',
        text(TABLE_X + TABLE_WIDTH + 10, TABLE_Y + 66, "other"),
        text(TABLE_X + TABLE_WIDTH + 10, TABLE_Y + 82, "layers"),
    ]


def _output() -> list[str]:
    middle, below = TABLE_X + TABLE_WIDTH / 2, TABLE_Y + 16 * ROW
    return [
        arrow(middle, below + 6, middle, below + 34),
        box(TABLE_X, below + 34, TABLE_WIDTH, 28, "sum of weight × row", READ),
        text(middle, below + 79, "weights: softmax of the scores", anchor="middle"),
        arrow(middle, below + 86, middle, below + 112),
        box(TABLE_X, below + 112, TABLE_WIDTH, 28, "gate: W2 (… × silu(W1 x))"),
        arrow(middle, below + 140, middle, below + 166),
        text(middle, below + 182, "y, in place of the feed-forward layer's", anchor="middle"),
        text(middle, below + 198, "output; the heads add up", anchor="middle"),
    ]


if __name__ == "__main__":
    print(memory_layer())
