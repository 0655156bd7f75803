"""Fetches files from remote stores (gs://, s3://, hf://, http) to a local cache, and mirrors a run's folder to a store.

Uses fsspec. Local copies allow random access to records, and give the same records after a restart.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memjax.io.console import say
from memjax.io.files import write_atomic
from memjax.io.lock import locked
from memjax.io.paths import missing_package, user_cache

_STEP_IS_COMPLETE = "_CHECKPOINT_METADATA"
"""The file of a checkpoint that is sent last; a step without it is incomplete."""

_MIRROR_ID = "mirror_id"
"""The file that identifies the run, in its folder and in its mirror."""

_NOT_SENT = "prepared/"
_WRITTEN_HERE = ("evals/", "prepared/")
"""Folders that local commands write into, even in a fetched copy; they are neither fetched nor removed."""

_PART = ".part"
"""Suffix of files that are being copied."""

_ALWAYS_SENT_BYTES = 1 << 20
"""Files up to this size are sent even if the copy has the same size."""


def fetch(
    address: str,
    wanted: Callable[[Sequence[str]], Sequence[str]] = lambda names: names,
    *,
    part: str = "",
    kept: tuple[str, ...] = (),
) -> pathlib.Path:
    """The local copy of a file, or the folder with the local copies of a folder's or glob's files.

    Files that are already local, and still match the store's metadata, are not fetched again. Only one process at a
    time fetches an address.

    Args:
        address: of a file, a folder or a glob.
        wanted: selects from the names of a folder's files.
        part: identifies the selection; different selections have different copies.
        kept: folders in the copy, with a trailing slash, that hold local files and must be kept.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package needed to read the address is missing.
        Exception: whatever the file system raises.
    """
    _require_packages(address)
    files, root = _files(address)
    copies = pathlib.Path(user_cache("fetched")) / hashlib.sha256(f"{address} {part}".encode()).hexdigest()[:16]
    names = wanted(sorted(files))
    if any(".." in name.split("/") for name in names):
        raise ValueError(f"{address}: a name in it leaves its folder")
    wait = lambda holder: say(f"waiting for {holder}, which copies {address}, too")
    with locked(copies.with_name(f"{copies.name}.lock"), on_wait=wait):
        places = {name: (copies / "files" / name, copies / "described" / f"{name}.json") for name in names}
        if changed := [name for name in names if not _is_copied(files[name], *places[name])]:
            say(f"copying {len(changed):,} files of {address} to {copies}")
        for name in changed:
            _copy(files[name], *places[name])
        for path in [path for path in (copies / "files").rglob("*") if path.is_file()]:
            name = path.relative_to(copies / "files").as_posix()
            # On a file system without locks, other processes may be copying at the same time.
            if name not in places and not name.startswith(kept) and not path.name.endswith(_PART):
                path.unlink(missing_ok=True)
    return copies / "files" / (root or "")


def _require_packages(address: str) -> None:
    if package := missing_package(address):
        raise ModuleNotFoundError(
            f"{address.partition('://')[0]}:// needs the package {package}, which is missing; "
            "pip install 'memjax[remote]'"
        )


def _files(address: str) -> tuple[dict[str, Mapping[str, Any]], str | None]:
    """Metadata of each file by its name relative to the folder, and the file's name if the address is a file."""
    import fsspec.core

    file_system, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    is_glob = any(sign in path for sign in "*[")
    if is_glob:
        found = file_system.glob(path, detail=True)
        base = path[: min(path.find(sign) for sign in "*[" if sign in path)].rpartition("/")[0]
    else:
        info = file_system.info(path)
        # Web servers show folders as pages with links to their files.
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
    """Whether the copy matches the store's current metadata."""
    try:
        return json.loads(record.read_text()) == _described(info) and info.get("size") in (None, copy.stat().st_size)
    except (OSError, ValueError):
        return False


def _copy(info: Mapping[str, Any], copy: pathlib.Path, record: pathlib.Path) -> None:
    for place in (copy, record):
        place.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{uuid.uuid4().hex}{_PART}")
    try:
        info["file_system"].get_file(info["name"], str(part))
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)
    record.write_text(json.dumps(_described(info)))


def _described(info: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in info.items() if name != "file_system"}


def fetch_run(address: str, step: int | str = "latest") -> pathlib.Path:
    """The local copy of a run's folder with the files needed to load a step: latest, best or its number.

    Raises:
        FileNotFoundError: there is no such folder.
        Exception: whatever the file system raises.
    """

    def wanted(names: Sequence[str]) -> Sequence[str]:
        by_step = {name: _step_of(name) for name in names}
        steps = {of for name, of in by_step.items() if of is not None and name.endswith(f"/{_STEP_IS_COMPLETE}")}
        if step == "latest":
            # Steps saved without tables are loaded only if named explicitly.
            whole = {of for of in steps if any(name.startswith(f"checkpoints/{of}/table_state/") for name in names)}
            whole = whole or steps
            steps = {max(whole)} if whole else set()
        elif step != "best":
            steps &= {int(step)}
        folders = (*_WRITTEN_HERE, "profile/", "tensorboard/", "plots/", "wandb/")
        return [name for name, of in by_step.items() if (of is None or of in steps) and not name.startswith(folders)]

    return fetch(address.rstrip("/"), wanted, part=str(step), kept=_WRITTEN_HERE)


def why_not_mirror(folder: pathlib.Path, address: str) -> str | None:
    """Why a run's folder cannot be mirrored to an address (it holds something else); None if it can.

    Raises:
        Exception: whatever the file system raises.
    """
    import fsspec.core

    _require_packages(address)
    file_system, root = fsspec.core.url_to_fs(address.rstrip("/"), use_listings_cache=False)
    there = here = None
    with contextlib.suppress(FileNotFoundError):
        there = file_system.cat_file(f"{root}/{_MIRROR_ID}").decode(errors="replace").strip()
    with contextlib.suppress(FileNotFoundError):
        here = (folder / _MIRROR_ID).read_text(encoding="utf-8").strip()
    if there is not None:
        if there == here:
            return None
        return (
            f"{address} is the mirror of another run than that in {folder}; name another address, or, to continue with "
            f"that run, copy all of {address} into run.dir"
        )
    try:
        found = [str(name).rstrip("/") for name in file_system.ls(root, detail=False)]
    except FileNotFoundError:
        return None
    # New repositories of the Hugging Face Hub contain a .gitattributes.
    names = [name.rpartition("/")[2] for name in found if name.strip("/") != root.strip("/")]
    if any(not name.startswith(".") for name in names):
        return f"{address} holds files that are not a mirror's; name another address, or an empty folder there"
    return None


def push(folder: pathlib.Path, address: str) -> None:
    """Updates the mirror of a run's folder: sends what has changed, then removes steps that are gone.

    The file that completes a step is sent last, and distinguishes it from an earlier step with the same number. If the
    folder has no steps, none are removed.

    Raises:
        ValueError: the address holds something else.
        Exception: whatever the file system raises.
    """
    import fsspec.core

    if problem := why_not_mirror(folder, address):
        raise ValueError(problem)
    if not (folder / _MIRROR_ID).exists():
        write_atomic(folder / _MIRROR_ID, f"{uuid.uuid4().hex}\n")
    file_system, root = fsspec.core.url_to_fs(address.rstrip("/"), use_listings_cache=False)
    file_system.makedirs(root, exist_ok=True)
    file_system.put_file(str(folder / _MIRROR_ID), f"{root}/{_MIRROR_ID}")
    there = {name.removeprefix(root).lstrip("/"): info for name, info in file_system.find(root, detail=True).items()}
    here = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in here}
    steps = {of for name in names if (of := _step_of(name)) is not None}
    for step in sorted(steps & {_step_of(name) for name in there}):
        if not _is_same_step(names, there, file_system, root, step):
            file_system.rm(f"{root}/checkpoints/{step}", recursive=True)
            there = {name: info for name, info in there.items() if _step_of(name) != step}
    for name, path in sorted(names.items(), key=lambda item: (item[0].endswith(_STEP_IS_COMPLETE), item[0])):
        step = _step_of(name)
        is_left_out = name.startswith((_NOT_SENT, _MIRROR_ID)) or path.name.startswith(".")
        if is_left_out or (step is None and name.startswith("checkpoints/")):
            continue
        try:
            size = path.stat().st_size
            is_there = name in there and there[name].get("size") == size
            if not is_there or (step is None and size <= _ALWAYS_SENT_BYTES):
                file_system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                file_system.put_file(str(path), f"{root}/{name}")
        except FileNotFoundError:
            if path.exists():
                raise  # an error of the store; otherwise the step was removed meanwhile
    if steps:
        for step in {of for name in there if (of := _step_of(name)) is not None} - steps:
            file_system.rm(f"{root}/checkpoints/{step}", recursive=True)


def _is_same_step(
    names: Mapping[str, pathlib.Path], there: Mapping[str, Any], file_system: Any, root: str, step: int
) -> bool:
    """Whether the mirror's step is complete and the same: the file that completes it holds the time of saving."""
    name = f"checkpoints/{step}/{_STEP_IS_COMPLETE}"
    if name not in there:
        return False
    try:
        return name in names and file_system.cat_file(f"{root}/{name}") == names[name].read_bytes()
    except FileNotFoundError:  # removed meanwhile
        return True


def _step_of(name: str) -> int | None:
    """The step number of the checkpoint that a file belongs to; None for other files."""
    first, _, rest = name.partition("/")
    number, slash, _ = rest.partition("/")
    return int(number) if first == "checkpoints" and slash and number.isdecimal() else None
