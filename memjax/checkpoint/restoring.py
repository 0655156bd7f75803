"""Restoring: the named items of one step, onto any mesh, compared with their digests."""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from memjax.checkpoint.blocks import block_targets, blocks, join_blocks
from memjax.checkpoint.digests import RowsDigest, array_digests, text_digest
from memjax.checkpoint.errors import Damaged, explained
from memjax.checkpoint.index import INDEX, differences, unseal
from memjax.checkpoint.names import as_stored, flatten, nest
from memjax.checkpoint.processes import any_process
from memjax.errors import CheckpointError, shown
from memjax.io.files import check_regular
from memjax.io.paths import literal

_Found = TypeVar("_Found")
_READERS, _AHEAD_BYTES = 4, 1 << 30
"""Threads that read blocks of one leaf, as unpacking a block is the work of one thread, and what they read at once at
most; of larger blocks one is read at a time."""
_AHEAD_SHARE = 32
"""Of a leaf that is put together in memory, they read one part in so many at once: a block is there several times while
it is read, and resuming should need no more memory than beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What `Checkpoints.restore` read: `arrays` has the trees of the targets."""

    step: int
    arrays: dict[str, Any]
    documents: dict[str, dict[str, Any]]


class StoredStep:
    """One step on disk; with several processes, each one calls every method."""

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        self.step = step
        self._path = folder / str(step)
        self._name = f"{folder}: step {step}"
        self._regular: set[str] = set()
        """Items whose files have been looked at."""

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        """What the step says of its items; raises Damaged if it cannot be read."""
        stored = self._items({INDEX: ocp.args.JsonRestore()})[INDEX]
        with explained(Damaged, f"{self._name}, item {INDEX}: is damaged"):
            return unseal(stored, self.step)

    def restore(self, targets: Mapping[str, Any], documents: Sequence[str], *, verify: bool) -> Restored:
        """Reads the named items, which the index has.

        Raises:
            CheckpointError: a target does not fit what was saved.
            Damaged: what is on disk is not what was saved, or cannot be read.
        """
        stored = self.index["arrays"]
        wanted = {item: as_stored(flatten(tree), stored.get(item, ())) for item, tree in targets.items()}
        self._check_fit(wanted, documents)
        texts = dict(self._items({item: ocp.args.JsonRestore() for item in documents})) if documents else {}
        for item, text in texts.items():
            if not isinstance(text, dict):
                raise Damaged(f"{self._name}, document {item}: is no JSON object")
            if verify and text_digest(text) != self.index["documents"][item]:
                raise Damaged(f"{self._name}, document {item}: its digest differs")
        arrays = {}
        for item, flat in wanted.items():
            leaves = self._read_leaves(item, flat, stored[item], verify)
            arrays[item] = jax.tree.unflatten(jax.tree.structure(targets[item]), leaves.values())
        return Restored(step=self.step, arrays=arrays, documents=texts)

    def read_rows(self, item: str, name: str, *, verify: bool) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of a leaf in host memory, block by block, each with the number of its first row.

        Raises:
            CheckpointError: there is no such leaf.
            Damaged: what is on disk is not what was saved, or cannot be read; at the last block at the latest.
        """
        record = self.index["arrays"].get(item, {}).get(name)
        if record is None:
            raise CheckpointError(f"{self._name} has no {item}/{name}")

        def read(piece: str, start: int, rows: int) -> tuple[int, np.ndarray]:
            shape = (rows, *record["shape"][1:])
            wanted = nest({piece: jax.ShapeDtypeStruct(shape, jnp.dtype(record["dtype"]))})
            how = nest({piece: ocp.RestoreArgs(restore_type=np.ndarray)})
            args = {item: ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)}
            block = flatten(self._items(args)[item])[piece]
            if not isinstance(block, np.ndarray) or block.shape != shape:
                raise Damaged(f"{self._name}, item {item}: {piece} did not come back")
            return start, block

        digest = RowsDigest()
        calls = [functools.partial(read, piece, *rows) for piece, rows in blocks(name, record).items()]
        for start, block in _ahead(calls, _readers(record)):
            if verify:
                digest.add(block, start)
            yield start, block
        if verify and digest.hex() != record["digest"]:
            raise Damaged(f"{self._name}, item {item}: digest differs in {name}")

    def _check_fit(self, wanted: Mapping[str, Any], documents: Sequence[str]) -> None:
        index = self.index
        problems = [f"{item}: no such item" for item in wanted if item not in index["arrays"]]
        problems += [f"{item}: no such document" for item in documents if item not in index["documents"]]
        hint = "build the model with the config of that run"
        types_alone = not problems
        for item in wanted.keys() & index["arrays"].keys():
            saved = index["arrays"][item]
            problems += differences(item, saved, wanted[item])
            shapes = {name: list(leaf.shape) for name, leaf in wanted[item].items()}
            types_alone &= shapes == {name: record["shape"] for name, record in saved.items()}
        if types_alone:
            hint += (
                " and the types that were saved: auto is bfloat16 on GPUs and float32 on CPUs, so a run that began on "
                "a GPU resumes elsewhere with --model.memory.table_dtype bfloat16 --allow_changed"
            )
        if problems:
            raise CheckpointError("\n  ".join([f"{self._name} does not fit; {hint}", *shown(problems)]))

    def _read_leaves(
        self, item: str, wanted: Mapping[str, Any], records: Mapping[str, Any], verify: bool
    ) -> dict[str, jax.Array]:
        places = {name: blocks(name, records[name]) for name in wanted}
        first_device = SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first_device)
            for name, leaf in wanted.items()
        }

        def read_blocks(name: str) -> Iterator[tuple[int, jax.Array]]:
            wanted, wide = block_targets(targets[name], places[name]), jax.config.read("jax_enable_x64")

            def read(piece: str) -> tuple[int, jax.Array]:
                with jax.enable_x64(wide):  # what the caller has set may hold for its thread alone
                    return places[name][piece][0], self._read_pieces(item, {piece: wanted[piece]})[piece]

            most = math.prod(targets[name].shape) * targets[name].dtype.itemsize // _AHEAD_SHARE
            return _ahead([functools.partial(read, piece) for piece in wanted], _readers(records[name], most))

        found = self._read_pieces(item, {name: target for name, target in targets.items() if name in places[name]})
        leaves = {
            name: found[name] if name in found else join_blocks(target, read_blocks(name))
            for name, target in targets.items()
        }
        if verify:
            with explained(Damaged, f"{self._name}, item {item}: cannot be compared with its digests"):
                digests = array_digests(leaves)
            if differ := [name for name in leaves if digests[name] != records[name]["digest"]]:
                raise Damaged(f"{self._name}, item {item}: digest differs in {', '.join(differ)}")
        return leaves

    def _read_pieces(self, item: str, pieces: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        if not pieces:
            return {}
        tree = nest(pieces)
        how = jax.tree.map(
            lambda t: ocp.ArrayRestoreArgs(sharding=t.sharding, global_shape=t.shape, dtype=t.dtype), tree
        )
        args = {item: ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)}

        def check(found: Mapping[str, Any]) -> None:
            leaves = flatten(found[item])
            # Orbax leaves the target in place of an array that it does not find.
            if lost := [name for name, target in pieces.items() if not _is_array_like(leaves.get(name), target)]:
                raise ValueError(f"{', '.join(lost)} did not come back")

        return flatten(self._items(args, check)[item])

    def _items(
        self, args: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None] | None = None
    ) -> Mapping[str, Any]:
        what = f"{self._name}, item {', '.join(args)}: cannot be read"
        try:
            found = self._items_here(args, what, check)
        except Damaged:
            any_process(True)
            raise
        # What one process cannot read, none goes on with: they would wait for each other for ever.
        if any_process(False):
            raise Damaged(f"{what} by another process")
        return found

    def _items_here(
        self, args: Mapping[str, Any], what: str, check: Callable[[Mapping[str, Any]], None] | None
    ) -> Mapping[str, Any]:
        with explained(Damaged, what):
            self._check_files(args)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader, literal(self._path) as path:
                found = reader.restore(path, args=ocp.args.Composite(**args))
            if missing := [item for item in args if found[item] is None]:
                raise ValueError(f"{', '.join(missing)} is missing")
            if check:
                check(found)
            return found

    def _check_files(self, items: Iterable[str]) -> None:
        """Raises an OSError where a pipe or a device is among the files, which would be read without end."""
        for item in set(items) - self._regular:
            for file in itertools.chain(self._path.iterdir(), (self._path / item).rglob("*")):
                if not file.is_dir():
                    check_regular(file.stat(), file)
            self._regular.add(item)


def _readers(record: Mapping[str, Any], most_bytes: int = _AHEAD_BYTES) -> int:
    """How many blocks of a leaf are read at a time."""
    rows = min(record["shape"][0], record["block_rows"]) if record["shape"] else 1
    block_bytes = rows * jnp.dtype(record["dtype"]).itemsize * math.prod(record["shape"][1:])
    # Processes wait for each other at every block, so there one thread keeps the order.
    return 1 if jax.process_count() > 1 else max(1, min(_READERS, min(most_bytes, _AHEAD_BYTES) // max(1, block_bytes)))


def _ahead(calls: Iterable[Callable[[], _Found]], threads: int) -> Iterator[_Found]:
    """What calls return, in their order; while one is waited for, the next ones run."""
    with ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[Future[_Found]] = collections.deque()
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) >= threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _is_array_like(leaf: Any, target: jax.ShapeDtypeStruct) -> bool:
    return isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
