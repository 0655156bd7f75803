"""JSON lines files, compressed or not."""

import gzip
import json
import lzma
import pathlib
from collections.abc import Iterator
from typing import Any


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a file: .xz, .gz or plain."""
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
