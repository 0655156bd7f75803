"""Files behind addresses such as gs://bucket/run: reading them by way of local copies, and keeping copies there.

fsspec does the work. Reading a copy keeps what local files give: records at random, and the same ones after a restart.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memjax.io.console import say
from memjax.io.paths import user_cache

STEP_IS_COMPLETE = "_CHECKPOINT_METADATA"
"""The file of a checkpoint that is sent last: a step without it is not all there."""

_NOT_SENT = "prepared/"
_ALWAYS_SENT_BYTES = 1 << 20
"""Files up to this size are sent although the copy has the same size."""


def fetch(
    address: str, wanted: Callable[[Sequence[str]], Sequence[str]] = lambda names: names, *, part: str = ""
) -> pathlib.Path:
    """The local copy of a file, or the folder with the copies of all files that a folder or a glob has.

    A file that is here already, and is still what the store describes, is not read again.

    Args:
        address: of a file, a folder or a glob.
        wanted: picks from the names of a folder's files.
        part: what it picks; copies of other parts are others.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: whatever the file system raises.
    """
    files, root = _files(address)
    copies = pathlib.Path(user_cache("fetched")) / hashlib.sha256(f"{address} {part}".encode()).hexdigest()[:16]
    names = wanted(sorted(files))
    if any(".." in name.split("/") for name in names):
        raise ValueError(f"{address}: a name in it leaves its folder")
    places = {name: (copies / "files" / name, copies / "described" / f"{name}.json") for name in names}
    if changed := [name for name in names if not _is_copied(files[name], *places[name])]:
        say(f"copying {len(changed):,} files of {address} to {copies}")
    for name in changed:
        _copy(files[name], *places[name])
    for stale in {path for path in (copies / "files").rglob("*") if path.is_file()} - {
        copies / "files" / name for name in names
    }:
        stale.unlink(missing_ok=True)
    return copies / "files" / (root or "")


def _files(address: str) -> tuple[dict[str, Mapping[str, Any]], str | None]:
    """What the store says of each file, by its name below the folder; and the name where the address is that of one."""
    import fsspec.core

    file_system, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    is_glob = any(sign in path for sign in "*[")
    if is_glob:
        found = file_system.glob(path, detail=True)
        base = path[: min(path.find(sign) for sign in "*[" if sign in path)].rpartition("/")[0]
    else:
        info = file_system.info(path)
        # A web server has pages for folders, with links to what is in them.
        if info["type"] == "file" and info.get("mimetype") != "text/html":
            name = path.rpartition("/")[2]
            return {name: {**info, "file_system": file_system}}, name
        found, base = file_system.find(path, detail=True), path.rstrip("/")
    found = {name: info for name, info in found.items() if info.get("type") == "file"}
    if not found:
        raise FileNotFoundError(2, "there is no such file", address)
    return {
        name.removeprefix(base).lstrip("/"): {**info, "name": name, "file_system": file_system}
        for name, info in found.items()
    }, None


def _is_copied(info: Mapping[str, Any], copy: pathlib.Path, record: pathlib.Path) -> bool:
    """Whether the copy is of what the store describes now."""
    try:
        return json.loads(record.read_text()) == _described(info) and info.get("size") in (None, copy.stat().st_size)
    except (OSError, ValueError):
        return False


def _copy(info: Mapping[str, Any], copy: pathlib.Path, record: pathlib.Path) -> None:
    for place in (copy, record):
        place.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    try:
        info["file_system"].get_file(info["name"], str(part))
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)
    record.write_text(json.dumps(_described(info)))


def _described(info: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in info.items() if name != "file_system"}


def fetch_run(address: str, step: int | str = "latest") -> pathlib.Path:
    """The local copy of a run's folder with what loading a step takes: latest, best or its number.

    Raises:
        FileNotFoundError: there is no such folder.
        Exception: whatever the file system raises.
    """

    def wanted(names: Sequence[str]) -> Sequence[str]:
        by_step = {name: _step_of(name) for name in names}
        steps = {of for name, of in by_step.items() if of is not None and name.endswith(f"/{STEP_IS_COMPLETE}")}
        if step == "latest":
            # One that was saved without its tables cannot be loaded unless it is asked for.
            whole = {of for of in steps if any(name.startswith(f"checkpoints/{of}/table_state/") for name in names)}
            whole = whole or steps
            steps = {max(whole)} if whole else set()
        elif step != "best":
            steps &= {int(step)}
        folders = ("prepared/", "profile/", "tensorboard/", "plots/", "wandb/")
        return [name for name, of in by_step.items() if (of is None or of in steps) and not name.startswith(folders)]

    return fetch(address.rstrip("/"), wanted, part=str(step))


def push(folder: pathlib.Path, address: str) -> None:
    """Makes the copy of a run's folder what the folder is: sends what has changed, and removes steps that are gone.

    A step is never changed, so its files are sent once, the one that completes it last.

    Raises:
        Exception: whatever the file system raises.
    """
    import fsspec.core

    file_system, root = fsspec.core.url_to_fs(address.rstrip("/"), use_listings_cache=False)
    there = {name.removeprefix(root).lstrip("/"): info for name, info in file_system.find(root, detail=True).items()}
    here = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in here}
    steps = {of for name in names if (of := _step_of(name)) is not None}
    complete = {_step_of(name) for name in there if name.endswith(f"/{STEP_IS_COMPLETE}")}
    for step in {of for name in there if (of := _step_of(name)) is not None} - steps:
        file_system.rm(f"{root}/checkpoints/{step}", recursive=True)
    for name, path in sorted(names.items(), key=lambda item: (item[0].endswith(STEP_IS_COMPLETE), item[0])):
        step = _step_of(name)
        is_left_out = name.startswith(_NOT_SENT) or path.name.startswith(".")
        if is_left_out or (step is None and name.startswith("checkpoints/")) or (step is not None and step in complete):
            continue
        try:
            size = path.stat().st_size
            if name not in there or there[name].get("size") != size or size <= _ALWAYS_SENT_BYTES:
                file_system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                file_system.put_file(str(path), f"{root}/{name}")
        except FileNotFoundError:
            if path.exists():
                raise  # of the store; else a step was removed meanwhile


def _step_of(name: str) -> int | None:
    """The number of the checkpoint that a file of a run belongs to."""
    first, _, rest = name.partition("/")
    number, slash, _ = rest.partition("/")
    return int(number) if first == "checkpoints" and slash and number.isdecimal() else None
