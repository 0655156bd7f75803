"""Damages files: bytes that differ in one place, JSON with one odd value, and things that are not files."""

import copy
import json
import os
import pathlib
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**53 + 1, 2**63, 10**30, -0.0, 0.5, 1e-320, 1e308),
    *("", "x", "null", "a" * 5000, "\x1b[2J\x07", "\ud800", "\x00", "../../x", "/etc/passwd", "~/x", "é\U0001f600"),
    *([], {}, [[]], [None], [1, "a"], list(range(1000)), {"": 0}, {"a": {"b": [1]}}),
)
_RAW = (
    *("NaN", "Infinity", "1e999", "-1e-999", "9" * 5000, "01", '{"a": 1, "a": 2}', '"\\ud800"', "{", "]"),
    *("[" * 50 + "]" * 50, "[" * 100_000 + "]" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000),
)
_MARK = "\x02raw\x02"


def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damages bytes in one way; returns a description and the result."""
    place = rng.randrange(max(1, len(data)))
    match rng.randrange(7):
        case 0 | 1 | 2 if data:
            bit = rng.randrange(8)
            return f"bit {8 * place + bit}", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        case 3:
            return f"cut at {place}", data[:place]
        case 4:
            return f"zeros from {place}", data[:place] + bytes(len(data) - place)
        case 5:
            stop = rng.randrange(place, len(data) + 1)
            return f"{place} to {stop} twice", data[:stop] + data[place:]
        case _:
            other = rng.randbytes(rng.randint(1, 20))
            return f"bytes inserted at {place}", data[:place] + other + data[place:]


def odd_json(document: Any, rng: random.Random) -> tuple[str, str]:
    """Changes one value, name or entry of a document; returns a description and the text."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places or rng.random() < 0.03:
        raw = rng.choice([*_RAW, *map(json.dumps, _ODD), "", " ", "\ufeff{}"])
        return f"all of it is {raw[:40]}", raw
    # Most places are deep, but those near the top matter more.
    depth = rng.randint(1, max(len(path) for path, _, _ in places))
    path, holder, key = rng.choice([place for place in places if len(place[0]) <= depth])
    where, raw = ".".join(path)[:200], None
    match rng.randrange(8):
        case 0:
            del holder[key]
            how = "removed"
        case 1 if isinstance(holder, dict):
            name = rng.choice(["", "x" * 3000, "\x1b[2J", "\ud800", f"{key}x", "../x", "version", "type"])
            holder[name] = holder.pop(key)
            how = f"called {name[:20]!r}"
        case 2 if isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice([1, 2, 5000])
            how = "repeated"
        case 3:
            raw = rng.choice(_RAW)
            holder[key], how = _MARK, raw[:40]
        case 4 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice([-1, 1, 7, 1 << 20, 1 << 40, -(1 << 31)])
            how = f"{holder[key]}"
        case 5 if isinstance(holder, dict):
            other = rng.choice(list(holder))
            holder[key] = holder[other]
            how = f"that of {other[:40]!r}"
        case _:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
            how = repr(holder[key])[:40]
    text = json.dumps(document)
    return f"{where}: {how}", text if raw is None else text.replace(json.dumps(_MARK), raw)


def _places(node: Any, path: tuple[str, ...] = ()) -> Any:
    """Yields the path, the container and the key of every value in a document."""
    if isinstance(node, dict | list):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield (*path, str(key)), node, key
            yield from _places(value, (*path, str(key)))


def replaced(path: pathlib.Path, rng: random.Random, outside: pathlib.Path) -> str:
    """Replaces a file with nothing, a folder, a pipe or a link; returns a description."""
    path.unlink()
    match rng.randrange(7):
        case 0:
            return "missing"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            path.symlink_to(path.name)
            return "a link to itself"
        case 3:
            path.symlink_to(outside)
            return "a link out of the folder"
        case 4:
            path.symlink_to("/dev/zero")
            return "a link to /dev/zero"
        case 5:
            os.mkfifo(path)
            return "a FIFO"
        case _:
            path.write_bytes(b"")
            return "empty"
