"""memjax against references that its authors did not write: torch, transformers and the tokenizers' own libraries.

    pip install torch transformers accelerate sentencepiece tiktoken    # in an environment that has memjax
    python experiments/references/run.py              # 5 minutes on two cores; no network, no download
    python experiments/references/run.py --report     # only the table of docs/checked.md, from the results

`--also PYTHON` runs the torch code of exported memory models in another environment too, one with torch, accelerate and
an older transformers. Every model and tokenizer is made on the spot, but for two small runs of the tests. The exit code
is 1 if a figure is beyond its bound.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import platform
import sys
import tempfile
from importlib import metadata

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "references.json"
PAGE = HERE.parents[1] / "docs" / "checked.md"
BEGIN, END = "<!-- made by experiments/references/run.py -->\n", "<!-- end of what run.py made -->"
PACKAGES = ("jax", "flax", "torch", "transformers", "accelerate", "tokenizers", "sentencepiece", "tiktoken")

sys.path.insert(0, str(HERE))

from checks import Check  # noqa: E402


def run(also: list[str]) -> list[Check]:
    """Every comparison, printed as it is made; those of memory models in torch by other interpreters too."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import conversions
    import layers
    import memory_models

    found = []
    with tempfile.TemporaryDirectory() as folder:
        parts = [pathlib.Path(folder) / name for name in ("models", "texts", "tokenizers", "memory")]
        for part in parts:
            part.mkdir()
        for check in itertools.chain(
            layers.layers(),
            conversions.token_ids(parts[2]),
            conversions.greedy_texts(parts[1]),
            conversions.models_in_and_out(parts[0]),
            memory_models.memory_models(parts[3], [sys.executable, *also]),
        ):
            print(f"{'pass' if check.passes else 'FAIL'}  {line(check)}", flush=True)
            found.append(check)
    return found


def line(check: Check) -> str:
    """A row of the table."""
    cells = (check.area, check.what, check.reference, check.measure, shown(check.figure), shown(check.bound))
    return f"| {' | '.join(cells)} |"


def shown(figure: float) -> str:
    """A count as it is, a difference with two digits."""
    return f"{figure:.0f}" if figure == int(figure) else f"{figure:.1e}"


def report(document: dict) -> str:
    """The table as Markdown, with the versions."""
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
    PAGE.write_text(before + BEGIN + report(document) + END + rest.split(END)[1], encoding="utf-8")


def main() -> int:
    """Runs the comparisons, or only writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table of docs/checked.md")
    parser.add_argument("--also", metavar="PYTHON", action="append", default=[], help="of an environment with torch")
    arguments = parser.parse_args()
    if not arguments.report:
        checks = run(arguments.also)
        document = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_page(document)
    return int(not all(Check(**check).passes for check in document["checks"]))


if __name__ == "__main__":
    sys.exit(main())
