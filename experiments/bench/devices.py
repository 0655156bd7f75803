"""The part `devices` of train_step.py: one device against several, in every layout.

Weak scaling: each device has the same number of tokens in every layout. Models with a memory use the axes `data` and
`memory`; dense ones use `data` and `tensor`. The most useful cases come first, as time may be limited.
"""

from collections.abc import Callable, Iterator
from typing import Any

import cases

Row = dict[str, Any]

COLUMNS = ("mesh", "tokens/s per GPU", "of one GPU", "of smallest table", "collectives ms", "exposed ms")
SAME = ("what", "size", "slots", "mesh", "devices")
"""Fields of a case that are copied to its row."""
COMMON = "--model.param_dtype bfloat16 --optim.table.state_columns 128"
"""On eight devices, each holds 128 columns of 373m's rows."""
SMALL = "--model.dim 512 --model.num_heads 8 --optim.table.state_columns 64"
"""Settings of tiny models, for the same reason."""


def layouts(count: int) -> list[tuple[int, int]]:
    """Sizes of `data` and `memory`: columns split, data parallel, then combinations of both."""
    between = [(count // memory, memory) for memory in (2, 4, 8) if 1 < memory < count and count % memory == 0]
    return list(dict.fromkeys([(1, count), (count, 1), *between]))


def tensor_layouts(count: int) -> list[tuple[int, int]]:
    """Sizes of `data` and `tensor`, for models without a memory."""
    return [(count // tensor, tensor) for tensor in (1, 2, 4, 8) if count % tensor == 0]


def cases_of(case: Callable[..., Row], counts: list[int], batch: int, *, small: bool) -> list[Row]:
    """All cases for the given numbers of devices.

    Args:
        case: makes a case from its name, preset and settings, as in train_step.py.
        counts: numbers of devices.
        batch: sequences per device.
        small: tiny models.
    """

    def make(what: str, size: str, keys: int | None, mesh: dict[str, int]) -> Row:
        devices = mesh["data"] * mesh["memory"] * mesh["tensor"]
        table = f"{keys**2:,} slots" if keys else "dense"
        axes = " x ".join(f"{name} {count}" for name, count in mesh.items() if name != "tensor" or count > 1)
        settings = [*COMMON.split(), "--data.batch_size", str(batch * devices)]
        settings += SMALL.split() if small else ["--train.remat", "block"] if size == "8b" else []
        settings += [word for name, count in mesh.items() for word in (f"--mesh.{name}", str(count))]
        settings += ["--model.memory.num_keys", str(keys)] if keys else []
        kind = "layer" if what == "memory layer" else "step"
        preset = str(cases.ROOT / f"configs/{size}_{'memory_plus_1m' if keys else 'dense'}.yaml")
        more = {"what": what, "size": size, "slots": keys and keys**2, "mesh": axes, "devices": devices}
        name = f"{what}, {size}, {table}, {axes}"
        return case(name, preset, *settings, **more, kind=kind, traces="collectives" if devices > 1 else None)

    def group(what: str, size: str, keys: int | None) -> Iterator[Row]:
        for count in counts:
            if keys is None:
                meshes = [{"data": data, "memory": 1, "tensor": tensor} for data, tensor in tensor_layouts(count)]
            else:
                # Data parallelism sends the same with a larger table, which every device would hold as a whole.
                meshes = [
                    {"data": data, "memory": memory, "tensor": 1}
                    for data, memory in layouts(count)
                    if keys == tables[0] or memory > 1 or count == 1
                ]
            yield from (make(what, size, keys, mesh) for mesh in meshes)

    tables = (16, 32) if small else (1024, 4096, 8192)
    groups: list[tuple[str, str, int | None]] = [("whole step", "373m", tables[0]), ("memory layer", "373m", tables[0])]
    groups += [(what, "373m", keys) for what in ("whole step", "memory layer") for keys in tables[1:]]
    if not small:
        groups += [("whole step", "1.3b", keys) for keys in (tables[0], None, *tables[1:])]
    groups.append(("whole step", "373m" if small else "8b", None))
    return [one for each in groups for one in group(*each)]


def compare(rows: list[Row]) -> None:
    """Adds to rows of this part comparisons with one device and with the smallest table."""
    measured = [row for row in rows if row.get("part") == "devices" and "what" in row and "tokens/s" in row]
    model = lambda row: (row["what"], row["size"])
    alone = {(*model(row), row["slots"]): row["tokens/s"] for row in measured if row["devices"] == 1}
    tables = sorted((row for row in measured if row["slots"]), key=lambda row: -row["slots"])
    smallest = {(*model(row), row["mesh"]): row["ms"] for row in tables}
    for row in measured:
        each = row["tokens/s"] / row["devices"]
        row["tokens/s per GPU"] = round(each)
        if one := alone.get((*model(row), row["slots"])):
            row["of one GPU"] = each / one
        if row["slots"]:
            row["of smallest table"] = row["ms"] / smallest[(*model(row), row["mesh"])]
