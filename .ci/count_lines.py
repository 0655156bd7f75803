"""Counts code lines of Python files, without blank lines, comments and docstrings (including those of attributes).

python .ci/count_lines.py [FOLDER ...]    # default: memjax/; prints lines by package, and their sum
"""

import ast
import collections
import pathlib
import sys
import tokenize

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(path: pathlib.Path) -> int:
    """Number of lines with at least one token of code; strings that are statements do not count."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in _NO_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Prints the lines of each package, and their sum."""
    for folder in map(pathlib.Path, sys.argv[1:] or ["memjax"]):
        counts: collections.Counter[str] = collections.Counter()
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            counts[inside[0] if len(inside) > 1 else "(top level)"] += code_lines(path)
        for package, count in sorted(counts.items()):
            print(f"{count:7,}  {package}")
        print(f"{counts.total():7,}  {folder}")


if __name__ == "__main__":
    main()
