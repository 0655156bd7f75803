"""Checkpoints: steps written in the background by Orbax, whole or not at all, and verified when they are read.

A step is a folder of items. An item of arrays is stored as nested names, one array per leaf; a leaf larger than a block
is stored as row blocks, `name/rows_<first row>`, so that reading and writing need memory for a block beside the leaf.
A document is one JSON file. The item `digests` indexes the others: shape, dtype and digest of every leaf, digest of
every document, the loss, and whether the step is partial, which is to say that large items were left out on purpose. It
is committed with them, by one rename.

Orbax (0.12) restores flipped bits without a word, hence the digests.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

BLOCK_BYTES = 2 << 30
"""Largest array that is stored in one piece: Orbax refuses single arrays near 96 GB."""

_CANNOT_SAVE = "{} cannot be written; is the disk full, and may this folder be written?"
_INDEX = "digests"
_TRASH = ".trash"
_SET_ASIDE = ".unreadable"


class CheckpointError(Exception):
    """A checkpoint cannot be written, found or read; the message names folder, step, item and the way out."""


class _Damaged(CheckpointError):
    """What is on disk is not what was saved, so an older step may do."""


class _Note(NamedTuple):
    """What the index says of a step as a whole."""

    loss: float | None
    partial: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What `Checkpoints.restore` read: `arrays` has the trees of the targets."""

    step: int
    arrays: dict[str, Any]
    documents: dict[str, dict[str, Any]]


class Checkpoints:
    """The checkpoints of one folder.

    Only saving creates or cleans the folder, so any number of readers may look at a run that is being trained. One
    writer at a time. With several processes, each one calls every method, at the same point of the run. A run that
    goes on saving restores with the same object, so that a step found damaged is saved again.

    Args:
        folder: Holds one folder per step.
        keep: Latest steps that stay, and as many of the latest complete ones.
        keep_best: Whether the step with the lowest loss stays too.
        verify: Whether everything read is compared with its digest.
        block_bytes: Arrays larger than this are stored as row blocks of at most this size (of one row at least).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_best: bool = True,
        verify: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.folder = pathlib.Path(folder).absolute()
        self._keep, self._keep_best, self._verify, self._block_bytes = keep, keep_best, verify, block_bytes
        self._manager: ocp.CheckpointManager | None = None
        self._notes: dict[int, _Note] = {}
        self._damaged: set[int] = set()
        self._replaced: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Every step on disk, ascending; a step still being written is not among them."""
        if not self.folder.is_dir():
            return []
        # Orbax renames a step's folder to its number when it is complete, and moves it away whole to delete it.
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def complete(self) -> list[int]:
        """The steps on disk that are not partial, ascending; damaged ones among them."""
        return [step for step in self.steps() if not self._note(step).partial]

    def latest(self) -> int | None:
        """The newest complete step on disk."""
        return max(self.complete(), default=None)

    def best(self) -> int | None:
        """The complete step on disk with the lowest loss, the newer one of equals; None when none has a loss."""
        return self._best(self.steps())

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        documents: Mapping[str, Mapping[str, Any]],
        *,
        loss: float | None = None,
        partial: bool = False,
    ) -> None:
        """Copies the arrays to host memory, then writes them in the background; does nothing if the step exists.

        A complete step takes the place of a partial one.

        The arrays may be donated as soon as this returns. A save that is still being written is waited for first.

        Args:
            step: Number of the step.
            arrays: A tree of `jax.Array` by item name.
            documents: JSON objects by item name.
            loss: What `best` ranks by; a step without one, or with one that is not finite, is never the best.
            partial: Items of other steps are left out: only who asks for this step by its number reads it.

        Raises:
            CheckpointError: this save, or the one before in the background, failed.
        """
        self.wait()
        if _any_process(step in self.steps()) and step not in self._damaged | self._replaced:
            if partial or not self._note(step).partial:
                return
            self._replaced.add(step)
        with self._explain(CheckpointError, _CANNOT_SAVE.format(f"step {step}")), self._fresh_after_failure():
            manager = self._open()
            leaves = {item: _flatten(tree) for item, tree in arrays.items()}
            records = {item: self._records(flat) for item, flat in leaves.items()}
            # Through JSON and back, because keys and tuples change on the way and the digest is of what is read.
            texts = {item: json.loads(json.dumps(document)) for item, document in documents.items()}
            digests = {item: _text_digest(text) for item, text in texts.items()}
            note = _Note(loss if loss is not None and math.isfinite(loss) else None, partial)
            index = {"arrays": records, "documents": digests, **note._asdict()}
            self._notes[step] = note
            items: dict[str, Any] = {item: ocp.args.JsonSave(text) for item, text in texts.items()}
            items[_INDEX] = ocp.args.JsonSave({"index": index, "digest": _text_digest(index)})
            for item, flat in leaves.items():
                if stored := _nest(_pieces(flat, records[item])):  # Orbax refuses empty items; the index has them
                    items[item] = ocp.args.PyTreeSave(stored)
            manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, targets: Mapping[str, Any], documents: Sequence[str] = (), *, step: int | None = None
    ) -> Restored:
        """Reads the named items and nothing else.

        Without `step`, a newest complete step that is damaged is reported on stderr and the one before it is read; the
        next save moves the damaged one out of the way.

        Args:
            targets: A tree of `jax.ShapeDtypeStruct` by item name. Leaves come back under their sharding, or on the
                first device where it is None; the mesh need not be the one that saved.
            documents: Names of JSON items.
            step: The step to read; None means the newest that can be read.

        Raises:
            CheckpointError: nothing there, nothing readable, or a target does not fit what was saved, or is what a
                partial step lacks.
        """
        candidates = self.complete()[::-1] if step is None else [step]
        if step is not None and step not in self.steps():
            raise CheckpointError(f"{self.folder}: there is no step {step}; there are {self.steps() or 'none'}")
        for candidate in candidates:
            try:
                found = self._read(candidate, targets, documents)
            except _Damaged as error:
                self._damaged.add(candidate)
                if step is not None:
                    raise
                print(f"warning: {error}; trying the step before", file=sys.stderr, flush=True)
            else:
                if step is None:
                    # Whoever goes on from here comes to the partial ones after it once more.
                    self._replaced.update(set(self.steps()) - set(candidates) - set(range(candidate)))
                return found
        if candidates:
            found = f"none of the steps {candidates} can be read"
        elif self.steps():
            found = f"the steps {self.steps()} are all partial, saved without their largest items"
        else:
            found = "there is no checkpoint"
        raise CheckpointError(f"{self.folder}: {found}; name the folder of another run, or start over in a new one")

    def read_document(self, name: str, step: int | None = None) -> dict[str, Any]:
        """One JSON item of a step, by default of the newest that can be read."""
        return self.restore({}, [name], step=step).documents[name]

    def check(self) -> None:
        """Raises CheckpointError if the last background save failed; never waits for one that is running."""
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises CheckpointError if the last save failed."""
        if self._manager is not None:
            with self._explain(CheckpointError, _CANNOT_SAVE.format("the last save")), self._fresh_after_failure():
                self._manager.wait_until_finished()
            self._empty_trash()

    def close(self) -> None:
        """Waits, then frees what saving needs. Reading, and saving again, stay possible."""
        self.wait()
        self._drop()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's preservation policy: the latest, the latest complete ones, and the best."""
        del context
        steps = sorted(info.step for info in checkpoints)
        complete = [step for step in steps if not self._note(step).partial]
        kept = {*steps[-self._keep :], *complete[-self._keep :], self._best(steps) if self._keep_best else None}
        return [info.step in kept for info in checkpoints]

    def _best(self, steps: Iterable[int]) -> int | None:
        notes = {step: self._note(step) for step in steps}
        losses = [(note.loss, -step) for step, note in notes.items() if note.loss is not None and not note.partial]
        return -min(losses)[1] if losses else None

    def _note(self, step: int) -> "_Note":
        if step not in self._notes:
            try:
                index = self._index(step)
            except _Damaged:
                return _Note(loss=None, partial=False)
            self._notes[step] = _Note(index["loss"], index.get("partial", False))
        return self._notes[step]

    def _open(self) -> ocp.CheckpointManager:
        if replaced := self._replaced.intersection(self.steps()):
            self._drop()
            if jax.process_index() == 0:
                for step in replaced:
                    shutil.rmtree(self.folder / str(step))
        self._replaced.clear()
        if damaged := self._damaged.intersection(self.steps()):
            self._drop()
            if jax.process_index() == 0:
                # Set aside, not deleted: a step may be unreadable for a reason that passes.
                (self.folder / _SET_ASIDE).mkdir(exist_ok=True)
                for step in damaged:
                    target = self.folder / _SET_ASIDE / str(step)
                    shutil.rmtree(target, ignore_errors=True)
                    (self.folder / str(step)).rename(target)
        self._damaged.clear()
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._empty_trash()
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    cleanup_tmp_directories=True,
                    # A step to delete is first moved away whole, so that a kill leaves no half of it in the list.
                    todelete_subdir=_TRASH,
                    # The losses are in the index; reading each step's metadata could only fail.
                    lightweight_initialize=True,
                ),
            )
        return self._manager

    def _drop(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    @contextlib.contextmanager
    def _fresh_after_failure(self) -> Iterator[None]:
        """After a failure, what Orbax remembers of the steps is no longer what is on disk."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):
                self._drop()
            raise

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:  # Orbax fills it only while a save is being finished
            shutil.rmtree(self.folder / _TRASH, ignore_errors=True)

    def _records(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        if other := [name for name, leaf in leaves.items() if not isinstance(leaf, jax.Array)]:
            raise TypeError(f"not a jax.Array: {', '.join(other)}")
        sums = jax.device_get({name: _digest(leaf) for name, leaf in leaves.items()})
        return {
            name: {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "block_rows": max(1, self._block_bytes // max(1, leaf.dtype.itemsize * math.prod(leaf.shape[1:]))),
                "digest": _hex(sums[name]),
            }
            for name, leaf in leaves.items()
        }

    def _index(self, step: int) -> dict[str, Any]:
        stored = self._items(step, {_INDEX: ocp.args.JsonRestore()})[_INDEX]
        with self._explain(_Damaged, f"step {step}, item {_INDEX}: is damaged"):
            if _text_digest(stored["index"]) != stored["digest"]:
                raise ValueError("its digest differs")
        return stored["index"]

    def _items(self, step: int, args: Mapping[str, Any]) -> Mapping[str, Any]:
        what = f"step {step}, item {', '.join(args)}: cannot be read"
        try:
            found = self._items_here(step, args, what)
        except _Damaged:
            _any_process(True)
            raise
        # What one process cannot read, none goes on with: they would wait for each other for ever.
        if _any_process(False):
            raise _Damaged(f"{self.folder}: {what} by another process")
        return found

    def _items_here(self, step: int, args: Mapping[str, Any], what: str) -> Mapping[str, Any]:
        with self._explain(_Damaged, what):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                found = reader.restore(self.folder / str(step), args=ocp.args.Composite(**args))
            if missing := [item for item in args if found[item] is None]:
                raise ValueError(f"{', '.join(missing)} is missing")
            return found

    def _read(self, step: int, targets: Mapping[str, Any], documents: Sequence[str]) -> Restored:
        index = self._index(step)
        wanted = {item: _flatten(tree) for item, tree in targets.items()}
        absent = [item for item in targets if item not in index["arrays"]]
        if absent and index.get("partial", False):
            newest = self.latest()
            way_out = "no step here has all of it" if newest is None else f"the newest step with all of it is {newest}"
            raise CheckpointError(f"{self.folder}: step {step} was saved without its {' and '.join(absent)}; {way_out}")
        problems = [f"{item}: no such item" for item in absent]
        problems += [f"{item}: no such document" for item in documents if item not in index["documents"]]
        for item in wanted.keys() & index["arrays"].keys():
            problems += _differences(item, index["arrays"][item], wanted[item])
        if problems:
            hint = "build the model with the config of that run"
            raise CheckpointError("\n  ".join([f"{self.folder}: step {step} does not fit; {hint}", *problems]))

        texts = dict(self._items(step, {item: ocp.args.JsonRestore() for item in documents})) if documents else {}
        for item, text in texts.items():
            if self._verify and _text_digest(text) != index["documents"][item]:
                raise _Damaged(f"{self.folder}: step {step}, document {item}: its digest differs")
        arrays = {}
        for item, flat in wanted.items():
            leaves = self._read_leaves(step, item, flat, index["arrays"][item])
            arrays[item] = jax.tree.unflatten(jax.tree.structure(targets[item]), leaves.values())
        return Restored(step=step, arrays=arrays, documents=texts)

    def _read_leaves(self, step: int, item: str, wanted: Mapping[str, Any], records: Any) -> dict[str, jax.Array]:
        blocks = {name: _blocks(name, records[name]) for name in wanted}
        shardings = {name: leaf.sharding or SingleDeviceSharding(jax.devices()[0]) for name, leaf in wanted.items()}
        in_one_piece = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in wanted.items()
            if name in blocks[name]
        }
        found = self._read_pieces(step, item, in_one_piece)
        leaves = {}
        for name, target in wanted.items():
            if name in found:
                leaves[name] = found[name]
                continue
            # Block by block into the donated leaf: beside it there is never more than one block.
            leaf = jax.jit(lambda t=target: jnp.zeros(t.shape, t.dtype), out_shardings=shardings[name])()
            put = jax.jit(_put_rows, donate_argnums=0, out_shardings=shardings[name])
            for piece, (start, rows) in blocks[name].items():
                shape = (rows, *target.shape[1:])
                block = jax.ShapeDtypeStruct(shape, target.dtype, sharding=_block_sharding(shardings[name]))
                leaf = put(leaf, self._read_pieces(step, item, {piece: block})[piece], start)
            leaves[name] = leaf
        if self._verify:
            sums = jax.device_get({name: _digest(leaf) for name, leaf in leaves.items()})
            if differ := [name for name in leaves if _hex(sums[name]) != records[name]["digest"]]:
                raise _Damaged(f"{self.folder}: step {step}, item {item}: digest differs in {', '.join(differ)}")
        return leaves

    def _read_pieces(self, step: int, item: str, pieces: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        if not pieces:
            return {}
        tree = _nest(pieces)
        how = jax.tree.map(
            lambda t: ocp.ArrayRestoreArgs(sharding=t.sharding, global_shape=t.shape, dtype=t.dtype), tree
        )
        args = {item: ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)}
        return _flatten(self._items(step, args)[item])

    @contextlib.contextmanager
    def _explain(self, kind: type[CheckpointError], what: str) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # explained already, or too little memory, which is no fault of the step
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise kind(f"{self.folder}: {what} ({reason})") from error


def _flatten(tree: Any) -> dict[str, Any]:
    """The leaves by name, in the order of the tree; names are the path joined by slashes."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in paths}
    if len(flat) != len(paths):
        raise CheckpointError(f"two leaves of a tree have one name; rename a key with a slash among {sorted(flat)}")
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return nested


def _blocks(name: str, record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """First row and number of rows by stored name; one block has the leaf's own name, an empty leaf has none."""
    shape, step = record["shape"], record["block_rows"]
    if 0 in shape:
        return {}
    if not shape or shape[0] <= step:
        return {name: (0, shape[0] if shape else 1)}
    return {f"{name}/rows_{start:08d}": (start, min(step, shape[0] - start)) for start in range(0, shape[0], step)}


def _pieces(leaves: Mapping[str, jax.Array], records: Mapping[str, Any]) -> dict[str, jax.Array]:
    stored = {}
    for name, leaf in leaves.items():
        blocks = _blocks(name, records[name])
        for piece, (start, rows) in blocks.items():
            stored[piece] = leaf if len(blocks) == 1 else _copy_rows(leaf, start, rows)
    return stored


def _copy_rows(leaf: jax.Array, start: int, rows: int) -> jax.Array:
    cut = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=_block_sharding(leaf.sharding))
    block = cut(leaf, start, rows)
    kinds = {memory.kind for memory in next(iter(block.sharding.device_set)).addressable_memories()}
    if jax.default_backend() != "cpu" and "pinned_host" in kinds:
        # One block at a time leaves the device; all of them there would be the table a second time.
        block = jax.device_put(block, block.sharding.with_memory_kind("pinned_host"))
    return block.block_until_ready()


def _put_rows(leaf: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, block, start, 0)


def _block_sharding(sharding: Sharding) -> Sharding:
    """The leaf's sharding for some of its rows: their number need not divide, so rows are not split."""
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=PartitionSpec(None, *sharding.spec[1:]))
    return sharding


def _differences(item: str, records: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    saved = {name: f"{record['dtype']}{record['shape']}" for name, record in records.items()}
    asked = {name: f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in wanted.items()}
    return [
        f"{item}/{name}: saved {saved.get(name, 'nothing')}, wanted {asked.get(name, 'nothing')}"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]


def _any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them ask at the same point."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _text_digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hex(sums: tuple[Any, Any]) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


@jax.jit
def _digest(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two 32-bit sums over the elements, the same on every mesh.

    Each word is sent through a one-to-one function that depends on its place, so a change within one word changes the
    digest with certainty, and any other change passes with probability 2**-64. Integer sums have no order.
    """
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)  # 8 bytes: a last axis of two words
    place = jnp.uint32(words.ndim)
    for axis in range(words.ndim):
        place = _scramble(place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + np.uint32(axis + 1))
    mixed = _scramble(words ^ place)
    # One reduction for both: with two, XLA keeps the words in memory to use them twice.
    zero, axes = np.uint32(0), tuple(range(words.ndim))
    return jax.lax.reduce((mixed, mixed * (place | np.uint32(1))), (zero, zero), _add_both, axes)


def _add_both(left: Any, right: Any) -> Any:
    return left[0] + right[0], left[1] + right[1]


def _scramble(words: jax.Array) -> jax.Array:
    """A one-to-one function of 32 bits whose every output bit hangs on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return words ^ (words >> np.uint32(16))
