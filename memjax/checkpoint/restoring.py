"""Restoring: reads named items of one step onto any mesh, and verifies their digests."""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from memjax.checkpoint.blocks import block_targets, blocks, join_blocks
from memjax.checkpoint.digests import RowsDigest, array_digests, compile_digests, text_digest
from memjax.checkpoint.errors import Damaged, explained
from memjax.checkpoint.index import INDEX, differences, unseal
from memjax.checkpoint.names import as_stored, flatten
from memjax.checkpoint.processes import any_process
from memjax.checkpoint.stored_arrays import read_arrays, read_parts
from memjax.errors import CheckpointError, shown
from memjax.io.files import check_regular
from memjax.io.paths import literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """The result of `Checkpoints.restore`; `arrays` has the same trees as the targets."""

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
        """Items known to consist of regular files."""

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        """The index of the step's items; raises Damaged if it cannot be read."""
        stored = self._documents([INDEX])[INDEX]
        with explained(Damaged, f"{self._name}, item {INDEX}: is damaged"):
            return unseal(stored, self.step)

    def restore(self, targets: Mapping[str, Any], documents: Sequence[str], *, verify: bool) -> Restored:
        """Reads the named items.

        Raises:
            CheckpointError: a target does not match what was saved.
            Damaged: the data on disk is not what was saved, or cannot be read.
        """
        stored = self.index["arrays"]
        wanted = {item: as_stored(flatten(tree), stored.get(item, ())) for item, tree in targets.items()}
        self._check_fit(wanted, documents)
        texts = self._documents(documents)
        for item, text in texts.items():
            if not isinstance(text, dict):
                raise Damaged(f"{self._name}, document {item}: is not a JSON object")
            if verify and text_digest(text) != self.index["documents"][item]:
                raise Damaged(f"{self._name}, document {item}: its digest differs")
        first_device = SingleDeviceSharding(jax.devices()[0])
        on_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first_device)
        wanted = {item: {name: on_device(leaf) for name, leaf in flat.items()} for item, flat in wanted.items()}
        digested = [leaf for flat in wanted.values() for leaf in flat.values()] if verify else []
        arrays = {}
        with ThreadPoolExecutor(1) as aside:
            compiling = aside.submit(compile_digests, digested)  # while arrays are read
            for item, flat in wanted.items():
                leaves = self._read_leaves(item, flat, stored[item])
                if verify:
                    self._verify(item, leaves, stored[item], compiling)
                arrays[item] = jax.tree.unflatten(jax.tree.structure(targets[item]), leaves.values())
        return Restored(step=self.step, arrays=arrays, documents=texts)

    def read_rows(self, item: str, name: str, *, verify: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the rows of a leaf in host memory, block by block, each with the index of its first row.

        Raises:
            CheckpointError: there is no such leaf.
            Damaged: the data on disk is not what was saved, or cannot be read; at the latest after the last block.
        """
        record = self.index["arrays"].get(item, {}).get(name)
        if record is None:
            raise CheckpointError(f"{self._name} has no {item}/{name}")
        of = lambda rows: jax.ShapeDtypeStruct((rows, *record["shape"][1:]), jnp.dtype(record["dtype"]))
        places = blocks(name, record)
        digest, wanted = RowsDigest(), {piece: of(rows) for piece, (_, rows) in places.items()}
        with self._reading([item]), literal(self._path / item) as folder:
            parts = read_parts(folder, wanted)
            for (start, _), part in zip(places.values(), parts, strict=True):
                if verify:
                    digest.add(part.values, start)
                yield start, part.values
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
        self, item: str, targets: Mapping[str, jax.ShapeDtypeStruct], records: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        places = {name: blocks(name, records[name]) for name in targets}
        pieces = [block_targets(target, places[name]) for name, target in targets.items()]
        with self._reading([item]), literal(self._path / item) as folder:
            found = read_arrays(folder, dict(itertools.chain(*(each.items() for each in pieces))))
            return {name: join_blocks(target, places[name], found) for name, target in targets.items()}

    def _verify(
        self, item: str, leaves: Mapping[str, jax.Array], records: Mapping[str, Any], compiling: Future[None]
    ) -> None:
        with explained(Damaged, f"{self._name}, item {item}: cannot be compared with its digests"):
            compiling.result()
            digests = array_digests(leaves)
        if differ := [name for name in leaves if digests[name] != records[name]["digest"]]:
            raise Damaged(f"{self._name}, item {item}: digest differs in {', '.join(differ)}")

    def _documents(self, names: Sequence[str]) -> dict[str, Any]:
        with self._reading(names):
            # As Orbax writes them.
            return {name: json.loads((self._path / name / "metadata").read_text("utf-8")) for name in names}

    @contextlib.contextmanager
    def _reading(self, items: Sequence[str]) -> Iterator[None]:
        """Raises errors of the body as `Damaged`, which names these items, in all processes."""
        what = f"{self._name}, item {', '.join(items)}: cannot be read"
        try:
            with explained(Damaged, what):
                self._check_files(items)
                yield
        except Damaged:
            any_process(True)
            raise
        # If one process cannot read, none may continue: they would wait for each other forever.
        if any_process(False):
            raise Damaged(f"{what} by another process")

    def _check_files(self, items: Iterable[str]) -> None:
        """Raises an OSError if a file is a pipe or a device, which could block or be read endlessly."""
        for item in set(items) - self._regular:
            for file in itertools.chain(self._path.iterdir(), (self._path / item).rglob("*")):
                if not file.is_dir():
                    check_regular(file.stat(), file)
            self._regular.add(item)
