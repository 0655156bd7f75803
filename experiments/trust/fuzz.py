"""Reads damaged and malicious files of every format that memjax supports, as its commands do.

A family is a folder of sound files and their reader. Every attempt changes one file, and the reader must succeed or
raise a proper error, within five CPU seconds and a gigabyte of memory, with nothing written or started outside the
folder.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lab import ROOT
from mutate import damage, odd_json, replaced

CPU_SECONDS, MEMORY_BYTES, MESSAGE_CHARACTERS = 5, 1 << 30, 4003
FIXTURES = ROOT / "tests/fixtures"
Faults = list[tuple[str, str]]
Attempts = Iterator[tuple[str, Callable[[], Faults]]]


@dataclasses.dataclass
class Family:
    """Sound files and their reader."""

    files: list[pathlib.Path]
    """The files to damage."""
    read: Callable[[], Any]
    same: Callable[[Any, Any, str], str] = lambda found, right, how: ""
    """Compares a result with that of the sound files, if no error was raised; returns what is wrong."""
    named: bool = False
    """Whether errors must name the file."""
    seal: Callable[[pathlib.Path], None] | None = None
    """Updates digests in other files to match the damaged one."""


def attempts(make: Callable[[pathlib.Path], Family], seed: int, count: int, folder: pathlib.Path) -> Attempts:
    """Reads the sound files, which must succeed, then yields attempts with damaged ones."""
    from memjax.errors import CheckpointError, ConfigError, DataError

    rng = random.Random(f"{make.__name__} {seed}")
    outside = folder.with_name(f"{folder.name}.outside")
    outside.write_bytes(b'{"secret": "of somebody else"}\n')
    os.chdir(folder)
    family = make(folder)
    sound = {path: path.read_bytes() for path in family.files}
    right = family.read()
    watch = _Watch(folder, outside)
    for number in range(count):
        path = family.files[number % len(family.files)]
        how = _change(path, sound[path], rng, outside)
        changed = folder.with_name(f"{folder.name}.changed")
        if os.path.lexists(path):
            path.rename(changed)
        path.write_bytes(sound[path])

        def attempt(path: pathlib.Path = path, changed: pathlib.Path = changed, how: str = how) -> Faults:
            path.unlink()
            if os.path.lexists(changed):
                changed.rename(path)
            if family.seal is not None and path.is_file() and not path.is_symlink():
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    family.seal(path)
            try:
                with watch:
                    found = family.read()
            except (ConfigError, DataError, CheckpointError, OSError) as error:
                return [*watch.faults(), *_refusal(error, path if family.named else None)]
            finally:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                for file in sound:
                    file.write_bytes(sound[file])
            wrong = family.same(found, right, how)
            return [*watch.faults(), *([("wrong", wrong)] if wrong else [])]

        yield f"{path.relative_to(folder)} {how}", attempt


def _change(path: pathlib.Path, sound: bytes, rng: random.Random, outside: pathlib.Path) -> str:
    """Changes a file in one way, and returns a description."""
    chance = rng.random()
    if chance < 0.04:
        return replaced(path, rng, outside)
    document: Any = None
    with contextlib.suppress(ValueError):
        document = json.loads(sound)
    if path.suffix == ".safetensors" and chance < 0.5:
        how, after = _odd_header(sound, rng)
    elif path.suffix == ".yaml" and chance < 0.7:
        how, after = _odd_yaml(sound, rng)
    elif path.suffix == ".jsonl" and chance < 0.6:
        lines = sound.split(b"\n")
        place = rng.randrange(len(lines) - 1)
        how, text = odd_json(json.loads(lines[place]), rng)
        how, after = f"line {place}: {how}", b"\n".join([*lines[:place], _bytes(text), *lines[place + 1 :]])
    elif document is not None and chance < 0.7:
        how, text = odd_json(document, rng)
        after = _bytes(text)
    else:
        how, after = damage(sound, rng)
    path.write_bytes(after)
    return how


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _odd_header(sound: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A safetensors file with an odd header or a wrong header length; the headers of patches contain JSON."""
    size = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + size])
    inner = header.get("__metadata__", {}).get("memjax.patch")
    if inner is not None and rng.random() < 0.7:
        how, header["__metadata__"]["memjax.patch"] = odd_json(json.loads(inner), rng)
        text = json.dumps(header)
    else:
        how, text = odd_json(header, rng)
    raw = _bytes(text)
    length = rng.choice([len(raw)] * 8 + [0, 1 << 20, 1 << 40, (1 << 64) - 1, len(raw) + 1])
    return f"header {length} {how}", length.to_bytes(8, "little") + raw + sound[8 + size :]


def _odd_yaml(sound: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A YAML file with one odd line."""
    lines = sound.decode().splitlines()
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    odd = rng.choice(_ODD_YAML)
    texts = [f"{key}: {odd}", f"{key}x: 1", f"  {lines[place]}", f"{key}: !!python/name:os", f"{lines[place]}\n" * 2]
    lines[place] = rng.choice(texts)
    return f"line {place}: {lines[place][:200]!r}", _bytes("\n".join(lines) + "\n")


_ODD_YAML = (
    *("null", "[]", "{}", "-1", "0", "1e400", ".nan", "-.inf", "'x'", "9" * 30, "9" * 9999, "1_000", "0x10", "017"),
    *("[[[[1]]]]", "[" * 5000, '"\\ud800"', '"\\e[2J"', "&a [*a]", "&a [1, *a]", "*b", "true", "yes", "~/x", "~"),
    *(
        "!!binary aGk=",
        "!!set {a}",
        "2020-01-01",
        "|\n   a",
        "{a: 1, a: 2}",
        "? a",
        "'",
        "\x00",
        "\u2028",
        "<<: {a: 1}",
    ),
    *("\n" + "".join(f"  unknown{n}: {n}\n" for n in range(20_000)), "gs://b/x", "/dev/zero", "1000000000000", "-0.0"),
)


def _refusal(error: Exception, path: pathlib.Path | None) -> Faults:
    text, faults = str(error), []
    if len(text) > MESSAGE_CHARACTERS:
        faults.append(("other", f"a message of {len(text)} characters: {text[:200]}"))
    if "of somebody else" in text:
        faults.append(("other", f"shows a file out of the folder: {text[:500]}"))
    if isinstance(error, OSError) and not (error.strerror or text):
        faults.append(("other", f"{type(error).__name__} without a word"))
    if path is not None and path.name not in text:
        faults.append(("other", f"names no file: {text[:500]}"))
    return faults


_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


class _Watch:
    """Records writes, processes and connections outside a folder, and memory use, while a block runs."""

    def __init__(self, folder: pathlib.Path, outside: pathlib.Path) -> None:
        self._inside = (str(folder.resolve()), "/dev/", "/proc/self/", os.environ["MEMJAX_COMPILE_CACHE"])
        self._outside, self._active, self._events = outside, False, []
        self._owner = threading.get_ident()
        # Audit hooks cannot be removed.
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self._events.clear()
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _memory("VmRSS")
        self._active = True

    def __exit__(self, *error: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event in _STARTS:
            self._events.append(f"{event} {arguments!r:.200}")
            return
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes or event in _WRITES:
            self._note(event, arguments[0])

    def _note(self, event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike) and not os.path.realpath(os.fsdecode(path)).startswith(
            self._inside
        ):
            self._events.append(f"{event} {path!r}")

    def faults(self) -> Faults:
        """The faults of the last block."""
        found: Faults = [("other", event) for event in self._events[:3]]
        if (taken := _memory("VmHWM") - self._before) > MEMORY_BYTES:
            found.append(("other", f"{taken >> 20} MB were taken"))
        if self._outside.read_bytes() != b'{"secret": "of somebody else"}\n':
            found.append(("other", "a file out of the folder was changed"))
        return found


def _memory(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
