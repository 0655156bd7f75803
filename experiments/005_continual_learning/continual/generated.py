"""Small generated files in the form of the real ones, for the size that only shows that everything runs."""

import json
import lzma
import pathlib
import random
from typing import Any

from factlab.entity_questions import STATEMENTS

from continual.facts import ARTICLES, EDITS, HELD_OUT, NEW, OLD
from memjax.io.files import write_atomic

_SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "to", "vi")


def write(folder: pathlib.Path) -> None:
    """Writes every file that `--data` must contain."""
    rng = random.Random(0)
    word = lambda: "".join(rng.choices(_SYLLABLES, k=3))
    names = [f"{word().title()} {word().title()} {number}" for number in range(80)]
    text = lambda: " ".join(word() for _ in range(60))
    articles = [{"id": str(number), "title": name, "text": text()} for number, name in enumerate(names[:20])]
    question = lambda name: {
        "relation": rng.choice(list(STATEMENTS)),
        "subject": name,
        "question": f"What about {name}?",
        "answers": [word().title()],
    }
    edit = lambda name: {
        "prompt": f"The mother tongue of {name} is",
        "rephrase_prompt": f"{name} speaks",
        "target_new": word(),
        "ground_truth": word(),
        "locality_prompt": f"The mother tongue of {rng.choice(names)} is",
    }
    files: dict[str, list[dict[str, Any]]] = {
        ARTICLES: articles,
        HELD_OUT: [{"id": str(number), "title": word(), "text": text()} for number in range(3)],
        OLD: [question(name) for name in names[:40]],
        NEW: [question(name) for name in names[40:60]],
        EDITS: [edit(name) for name in names[60:]],
    }
    for name, rows in files.items():
        write_atomic(folder / name, lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
