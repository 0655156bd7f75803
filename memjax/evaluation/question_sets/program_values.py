"""The types whose values cross between a program and its tests, and how each is encoded and decoded."""

import builtins
import collections
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Codec(NamedTuple):
    """Splits a value into parts, which are encoded in turn, and makes a value of parts."""

    parts: Callable[[Any], Iterable[Any]]
    make: Callable[[Any, list[Any]], Any] = lambda kind, parts: kind(*parts)
    """Makes a value of the type from its parts."""
    fill: Callable[[Any, list[Any]], object] | None = None
    """Replaces the contents; only for mutable containers."""
    empty: Callable[[Any, list[Any]], Any] = lambda kind, _: kind()
    """Makes a mutable container to fill later; the parts are not decoded yet, because they may refer to it."""


def _items(value: Any) -> Iterator[Any]:
    return (part for pair in dict.items(value) for part in pair)


def _fill_dict(value: Any, parts: list[Any]) -> None:
    value.clear()
    for key, item in zip(parts[::2], parts[1::2], strict=True):
        value[key] = item


def _fill_defaultdict(value: Any, parts: list[Any]) -> None:
    value.default_factory = parts[0]
    _fill_dict(value, parts[1:])


def _replace(value: Any, parts: list[Any]) -> None:
    value[:] = parts


def _refill(add: str, first: int = 0) -> Callable[[Any, list[Any]], None]:
    def refill(value: Any, parts: list[Any]) -> None:
        value.clear()
        getattr(value, add)(parts[first:])

    return refill


@functools.cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


_range = Codec(lambda value: (value.start, value.stop, value.step))
_moment = Codec(
    lambda value: (value.isoformat(), value.fold),
    lambda kind, parts: kind.fromisoformat(parts[0]).replace(fold=parts[1]),
)

# Parts are taken with the builtin's own methods, so that a subclass cannot send anything but its contents.
CODECS = {
    "builtins.int": Codec(lambda value: (hex(int.__int__(value)),), lambda kind, parts: kind(*parts, 16)),
    "builtins.float": Codec(lambda value: (float.__float__(value),)),
    "builtins.str": Codec(lambda value: (str.__str__(value),)),
    "builtins.complex": Codec(lambda value: (value.real, value.imag)),
    "builtins.bytes": Codec(lambda value: (bytes.hex(value),), lambda kind, parts: kind.fromhex(*parts)),
    "builtins.tuple": Codec(tuple.__iter__, lambda kind, parts: kind(parts)),
    "builtins.frozenset": Codec(frozenset.__iter__, lambda kind, parts: kind(parts)),
    "builtins.range": _range,
    "builtins.slice": _range,
    "builtins.list": Codec(list.__iter__, fill=_replace),
    "builtins.set": Codec(set.__iter__, fill=_refill("update")),
    "builtins.bytearray": Codec(
        lambda value: (bytearray.hex(value),),
        fill=lambda value, parts: _replace(value, list(bytes.fromhex(*parts))),
    ),
    "builtins.dict": Codec(_items, fill=_fill_dict),
    "builtins.dict_keys": Codec(iter, lambda _, parts: dict.fromkeys(parts).keys()),
    "builtins.dict_items": Codec(iter, lambda _, parts: dict(parts).items()),
    "collections.namedtuple": Codec(
        lambda value: (type(value).__name__, value._fields, *tuple.__iter__(value)),
        lambda _, parts: _named(*parts[:2])._make(parts[2:]),
    ),
    "collections.Counter": Codec(_items, fill=_fill_dict),
    "collections.OrderedDict": Codec(lambda value: [part for pair in value.items() for part in pair], fill=_fill_dict),
    "collections.defaultdict": Codec(lambda value: (value.default_factory, *_items(value)), fill=_fill_defaultdict),
    "collections.deque": Codec(
        lambda value: (value.maxlen, *value),
        fill=_refill("extend", 1),
        empty=lambda kind, parts: kind((), parts[0]),
    ),
    "decimal.Decimal": Codec(lambda value: (str(value),)),
    "fractions.Fraction": Codec(lambda value: (value.numerator, value.denominator)),
    "datetime.datetime": _moment,
    "datetime.date": Codec(lambda value: (value.isoformat(),), lambda kind, parts: kind.fromisoformat(*parts)),
    "datetime.time": _moment,
    "datetime.timedelta": Codec(lambda value: (value.days, value.seconds, value.microseconds)),
}
_NAMELESS = {f"builtins.{kind.__name__}": kind for kind in map(type, ({}.keys(), {}.items()))} | {
    "collections.namedtuple": tuple
}
"""Types that cannot be found in a module by their names."""
TYPES = {*CODECS, "builtins.bool", "builtins.object"} | {
    f"builtins.{name}"
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception)
}
"""Types that both processes have: those with values, and exceptions."""


def name_of(kind: type) -> str:
    """The module and name of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def type_of(name: Any) -> Any:
    """The type of this name; ValueError if it is not in `TYPES`."""
    if name not in TYPES:
        raise ValueError(f"not a known type: {str(name)[:80]!r}")
    if name in _NAMELESS:
        return _NAMELESS[name]
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def codec_name(kind: type) -> str | None:
    """The name of the type with a codec that a type is or extends; None without one."""
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return "collections.namedtuple"
    return next((name for name in map(name_of, kind.__mro__) if name in CODECS), None)


class Cells:
    """The mutable containers of a request and its answer."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._indices: dict[int, int] = {}
        self._before: list[list[Any]] = []

    def index(self, value: object) -> int:
        """The index of a container, which is added if it is new."""
        if id(value) not in self._indices:
            self._indices[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._indices[id(value)]

    def parts(self, index: int) -> tuple[str, list[Any]]:
        """The name of a container's type, and its contents."""
        name = codec_name(type(self.objects[index]))
        assert name is not None
        return name, list(CODECS[name].parts(self.objects[index]))

    def remember(self) -> None:
        """Remembers the contents of all containers, with which `has_changed` compares."""
        self._before = [self.parts(index)[1] for index in range(len(self.objects))]

    def has_changed(self, index: int) -> bool:
        """Whether a container's contents must be sent: it is new, or no longer holds the same objects."""
        if index >= len(self._before):
            return True
        before, (_, now) = self._before[index], self.parts(index)
        return len(before) != len(now) or not all(map(_same, before, now))

    def forget_new(self) -> None:
        """Removes the containers added since `remember`."""
        for value in self.objects[len(self._before) :]:
            del self._indices[id(value)]
        del self.objects[len(self._before) :]


def _same(first: object, second: object) -> bool:
    return first is second or (type(first) is type(second) and type(first) in (int, str) and first == second)


def item_of(objects: list[Any], index: Any) -> Any:
    """The object at an index that the other process sent; ValueError if there is none."""
    if type(index) is not int or not 0 <= index < len(objects):
        raise ValueError("no such object")
    return objects[index]
