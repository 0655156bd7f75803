"""Compares memjax with independent references: torch, transformers, lm-eval and others.

    # In an environment with memjax:
    pip install torch transformers accelerate sentencepiece tiktoken lm-eval torchmetrics product-key-memory \\
        PEER-pytorch
    python experiments/references/run.py              # 10 minutes on two cores; no network, no download
    python experiments/references/run.py training     # only some parts; the results of the others are kept
    python experiments/references/run.py --report     # only the table of docs/checked.md, from the results

`--also PYTHON` also runs the torch code of exported memory models in another environment, with torch, accelerate and an
older transformers. `--data FOLDER` names files of published questions and problems; that part is skipped without it.
All models and tokenizers are generated, except for the small runs of the tests. The exit code is 1 if a figure exceeds
its bound.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata

from memjax.io.files import write_atomic

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "references.json"
PAGE = HERE.parents[1] / "docs" / "checked.md"
BEGIN, END = "<!-- made by experiments/references/run.py -->\n", "<!-- end of what run.py made -->"
PACKAGES = (
    "jax", "flax", "torch", "transformers", "accelerate", "tokenizers", "sentencepiece", "tiktoken", "lm-eval",
    "torchmetrics", "product-key-memory", "PEER-pytorch",
)  # fmt: skip
PARTS = {
    "layers": ("layers", "optimizers"),
    "training": ("training",),
    "conversions": ("tokenizers", "generation", "models in", "models out"),
    "evaluation": ("evaluation",),
    "memory_models": ("memory in torch",),
    "public_sets": ("public sets",),
}
"""Parts that can be run alone, and the areas of the table that each produces, in order."""

sys.path.insert(0, str(HERE))

from checks import Check  # noqa: E402


def run(part: str, arguments: argparse.Namespace) -> Iterator[Check]:
    """The comparisons of a part; memory models also run in other environments."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if part == "layers":
            import layers
            import lookups

            yield from layers.layers()
            yield from lookups.lookups()
        elif part == "training":
            import training

            yield from training.training(folder)
        elif part == "conversions":
            import conversions

            for number, compare in enumerate(
                (conversions.token_ids, conversions.greedy_texts, conversions.models_in_and_out)
            ):
                (folder / str(number)).mkdir()
                yield from compare(folder / str(number))
        elif part == "evaluation":
            import evaluation

            yield from evaluation.evaluation(folder)
        elif part == "memory_models":
            import memory_models

            yield from memory_models.memory_models(folder, [sys.executable, *arguments.also])
        else:
            import public_sets

            yield from public_sets.public_sets(arguments.data, folder)


def line(check: Check) -> str:
    """A row of the table."""
    cells = (check.area, check.what, check.reference, check.measure, shown(check.figure), shown(check.bound))
    return f"| {' | '.join(cells)} |"


def shown(figure: float) -> str:
    """Formats a count as an integer, a difference with two digits."""
    return f"{figure:.0f}" if figure == int(figure) else f"{figure:.1e}"


def report(document: dict) -> str:
    """The table as Markdown, with package versions."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    checks = [Check(**check) for check in document["checks"]]
    failed = sum(not check.passes for check in checks)
    return "\n".join(
        [
            f"{len(checks) - failed} of {len(checks)} pass, on {document['date']} with {versions}.",
            "",
            "| Part | What | Against | Figure is | Found | At most |",
            "|---|---|---|---|---|---|",
            *map(line, checks),
            "",
        ]
    )


def write_page(document: dict) -> None:
    """Puts the table into docs/checked.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    write_atomic(PAGE, before + BEGIN + report(document) + END + rest.split(END)[1])


def versions() -> dict[str, str]:
    """Versions of all packages that take part."""
    return {name: metadata.version(name) for name in PACKAGES}


def merged(document: dict, parts: list[str], found: list[Check]) -> dict:
    """The document with the previous results of these parts replaced."""
    new = {area for part in parts for area in PARTS[part]}
    checks = [check for check in document["checks"] if check["area"] not in new] + list(map(dataclasses.asdict, found))
    order = [area for areas in PARTS.values() for area in areas]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions(),
        "checks": sorted(checks, key=lambda check: order.index(check["area"])),
    }


def main() -> int:
    """Runs the comparisons, or only writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts to run, of {', '.join(PARTS)}; default: all")
    parser.add_argument("--report", action="store_true", help="only write the table of docs/checked.md")
    parser.add_argument(
        "--also", metavar="PYTHON", action="append", default=[], help="interpreter of another environment with torch"
    )
    parser.add_argument("--data", metavar="FOLDER", type=pathlib.Path, help="files of published questions and problems")
    arguments = parser.parse_args()
    parts = arguments.parts or [part for part in PARTS if part != "public_sets" or arguments.data]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)} unknown; parts are {', '.join(PARTS)}")
    if "public_sets" in parts and arguments.data is None:
        parser.error("public_sets needs --data FOLDER")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not arguments.report:
        here, kept = versions(), document["versions"]
        if arguments.parts and any(here[name] != version for name, version in kept.items()):
            parser.error(f"the other parts were run with {kept}; run all of them")
        found = []
        for part in parts:
            for check in run(part, arguments):
                print(f"{'pass' if check.passes else 'FAIL'}  {line(check)}", flush=True)
                found.append(check)
        document = merged(document, parts, found)
        write_atomic(RESULTS, json.dumps(document, indent=1) + "\n")
    write_page(document)
    return int(not all(Check(**check).passes for check in document["checks"]))


if __name__ == "__main__":
    sys.exit(main())
