"""Analyses a trace: the operations that took most time, and how far collectives overlap with other work."""

import pathlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

_NAME_WIDTH = 80
_NANOSECONDS = 1e-9
_COLLECTIVES = ("nccl", "allreduce", "allgather", "alltoall", "reducescatter", "collectivepermute")
"""Parts of the names of communication kernels, in lower case without underscores and hyphens."""


class Operation(NamedTuple):
    """Total time and number of uses of one operation."""

    name: str
    """Name without the suffix that numbers its uses."""
    seconds: float
    """Total over all uses and devices, without the operations nested in it."""
    uses: int


def newest_trace(folder: pathlib.Path) -> pathlib.Path:
    """The newest trace in a folder or its subfolders; FileNotFoundError if there is none."""
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder}: the profiler wrote no trace")
    return found[-1]


def operations(profile: Any) -> list[Operation]:
    """The operations of a trace (a `jax.profiler.ProfileData`), slowest first.

    For GPUs, these are the kernels and copies in their streams; without accelerators, what XLA ran on the CPU.
    """
    seconds: dict[str, float] = defaultdict(float)
    uses: dict[str, int] = defaultdict(int)
    streams = _lines(profile, "Stream")
    # Kernels of a stream may overlap but are not nested; XLA's operations and those of threads are.
    times = [[(event.name, event.duration) for event in stream] for stream in streams] or [
        _own_times(line) for line in _lines(profile, "XLA Ops") or _cpu_lines(profile)
    ]
    for line in times:
        for name, own in line:
            # fusion.12 and fusion.13 count as the same operation.
            name = re.sub(r"(?<=\w)([._]\d+)+$", "", name)
            seconds[name] += own * _NANOSECONDS
            uses[name] += 1
    return sorted((Operation(name, seconds[name], uses[name]) for name in seconds), key=lambda found: -found.seconds)


class Overlap(NamedTuple):
    """Seconds of a GPU between the start of its first operation and the end of its last."""

    span: float
    idle: float
    """Seconds in which nothing ran on any stream."""
    collectives: float
    """Seconds in which data was being sent to or received from other devices."""
    exposed: float
    """The part of `collectives` in which nothing else ran."""


def overlaps(profile: Any) -> dict[str, Overlap]:
    """Overlap of collectives with other work, for each GPU of a trace."""
    found = {}
    for plane in _devices(profile):
        events = [event for stream in _lines_of(plane, "Stream") for event in stream]
        if not events:
            continue
        collectives = _covered([event for event in events if is_collective(event.name)])
        others = _covered([event for event in events if not is_collective(event.name)])
        span = max(event.start + event.duration for event in events) - min(event.start for event in events)
        times = (span, span - _covered(events), collectives, _covered(events) - others)
        found[plane.name] = Overlap(*(time * _NANOSECONDS for time in times))
    return found


def describe_overlap(device: str, overlap: Overlap) -> str:
    """Formats a GPU's overlap as one line of text."""
    span, idle, collectives, exposed = (f"{seconds * 1e3:,.1f} ms" for seconds in overlap)
    text = f"{device}: {span} from first to last operation, of which {idle} idle"
    return f"{text}, collectives {collectives}, of which {exposed} exposed" if overlap.collectives else text


def table(found: list[Operation], top: int) -> str:
    """Formats the slowest operations as a table, each with its share of the total time."""
    total = sum(operation.seconds for operation in found)
    if not found:
        return "the trace has no operations"
    rest = found[top:]
    shown = found[:top]
    if rest:
        rest_seconds, rest_uses = sum(o.seconds for o in rest), sum(o.uses for o in rest)
        shown = [*shown, Operation(f"({len(rest)} others)", rest_seconds, rest_uses)]
    shown = [*shown, Operation("all", total, sum(operation.uses for operation in found))]
    lines = [f"{'ms':>12}{'share':>8}{'count':>9}  operation"]
    for name, seconds, uses in shown:
        short = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
        lines.append(f"{seconds * 1e3:>12,.3f}{seconds / max(total, 1e-12):>8.1%}{uses:>9,}  {short}")
    return "\n".join(lines)


class _Event(NamedTuple):
    name: str
    start: float
    """In nanoseconds, like the duration."""
    duration: float


def _lines(profile: Any, prefix: str) -> list[list[_Event]]:
    """Lines of all accelerators whose names have the prefix: streams of GPUs, or XLA operations of other devices."""
    return [line for plane in _devices(profile) for line in _lines_of(plane, prefix)]


def _devices(profile: Any) -> list[Any]:
    """The accelerators' planes."""
    return [plane for plane in profile.planes if plane.name.startswith("/device:")]


def is_collective(operation: str) -> bool:
    """Whether an operation of that name communicates."""
    name = operation.lower().replace("_", "").replace("-", "")
    return any(word in name for word in _COLLECTIVES)


def _lines_of(plane: Any, prefix: str) -> list[list[_Event]]:
    """Lines of a plane whose names have the prefix."""
    return [
        [_Event(event.name, event.start_ns, event.duration_ns) for event in line.events]
        for line in plane.lines
        if line.name.startswith(prefix)
    ]


def _covered(events: Iterable[_Event]) -> float:
    """Total time during which at least one of the events was running."""
    covered, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        covered += max(0.0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    return covered


def _cpu_lines(profile: Any) -> list[list[_Event]]:
    """Operations of compiled programs, by thread."""
    plane = profile.find_plane_with_name("/host:CPU")
    found = []
    with warnings.catch_warnings():
        # Under Python 3.12, `stats` causes a warning, which would end the process if warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        for line in plane.lines if plane else []:
            events = [(event, dict(event.stats)) for event in line.events if event.duration_ns]
            found.append([_Event(e.name, e.start_ns, e.duration_ns) for e, stats in events if "hlo_op" in stats])
    return found


def _own_times(events: Iterable[_Event]) -> list[tuple[str, float]]:
    """Name of each event of a line, and its time without that of nested events, such as those in the body of a loop."""
    times: list[tuple[str, float]] = []
    open_events: list[tuple[int, float]] = []  # number and end
    # Of two events that begin together, the longer one is the outer one.
    for event in sorted(events, key=lambda event: (event.start, -event.duration)):
        while open_events and open_events[-1][1] <= event.start:
            open_events.pop()
        if open_events:
            outer = open_events[-1][0]
            times[outer] = (times[outer][0], times[outer][1] - event.duration)
        open_events.append((len(times), event.start + event.duration))
        times.append((event.name, event.duration))
    return times
