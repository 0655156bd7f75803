"""Requests and answers between a program and its tests, which run in two processes joined by two pipes.

A message is a JSON frame of bounded length, in which all values except None, bool, float, str and small int are lists
that start with a tag. An instance of a subclass is sent as the builtin that it extends, without its methods. An object
that is not data is sent as a number under which its process keeps it; the other process gets a `Proxy`, whose
operations are requests.

Mutable containers are cells, to which values refer by index, so that aliases and cycles survive within a request and
its answer; the answer returns the new contents of arguments that changed. Everything else is copied.

A message can only become data, a proxy, or the end of the conversation, so the tests need not trust its sender.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from memjax.evaluation.question_sets.program_proxy import OPERATIONS, Proxy
from memjax.evaluation.question_sets.program_values import (
    CODECS,
    TYPES,
    Cells,
    codec_name,
    item_of,
    name_of,
    type_of,
)

_MESSAGE_BYTES = 32 << 20
_NESTING = 100
_SMALL = 1 << 63
_PLAIN = {type(None), bool, float, str}


class Lost(BaseException):
    """The other process is gone or sends malformed messages; not an Exception, so that tests do not catch it."""


class Channel:
    """Two pipes for JSON frames."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes

    def frame(self, message: list[Any]) -> bytes:
        """The bytes of a message; ValueError if it is too long."""
        # Escaped, two adjacent surrogates would be decoded as one character.
        body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        if len(body) > _MESSAGE_BYTES:
            raise ValueError(f"{len(body)} bytes between a program and its tests; {_MESSAGE_BYTES} are allowed")
        return len(body).to_bytes(4, "big") + body

    def write(self, frame: bytes) -> None:
        """Sends a message."""
        left = memoryview(frame)
        while left:
            left = left[os.write(self._writes, left) :]

    def read(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other process has closed its end.
            ValueError: it is not a message.
        """
        size = int.from_bytes(self._exactly(4), "big")
        if size > _MESSAGE_BYTES:
            raise ValueError(f"{size} bytes; {_MESSAGE_BYTES} are allowed")
        return json.loads(self._exactly(size).decode("utf-8", "surrogatepass"))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._reads, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


class Peer:
    """One of the two processes: sends requests, and meanwhile answers those of the other.

    `may` decides whether the other process may perform an operation on an object exported to it, with these arguments.
    """

    def __init__(self, channel: Channel, may: Callable[[str, Any, Sequence[Any]], bool]) -> None:
        self._channel, self._may = channel, may
        self._exports: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._proxies: dict[int, Proxy] = {}
        self._errors: dict[int, type[Exception]] = {}
        self.failure: str | None = None
        """Why the conversation ended; empty if the other process closed it, None while it goes on."""

    def export(self, value: object) -> int:
        """The number by which the other process refers to an object."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._exports)
            self._exports.append(value)
        return self._numbers[id(value)]

    def proxy(self, number: Any) -> Proxy:
        """The proxy for the object that the other process exports under a number."""
        if type(number) is not int:
            raise ValueError("not a number")
        return self._proxies.setdefault(number, Proxy(self.ask, number))

    def ask(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Has the other process perform an operation and returns its result.

        Raises:
            Lost: it does not answer.
            Exception: the operation raises it there.
        """
        cells = Cells()
        values = self._encode_all([*args, *kwargs.values()], cells)
        self._send(self._frame("ask", [operation, *kwargs], values, cells))
        while True:
            kind, found = self._receive(cells)
            if kind == "answer":
                return found
            if kind == "error":
                if operation != "next" and isinstance(found, StopIteration | StopAsyncIteration):
                    # The caller's loops would take it as their own end.
                    raise RuntimeError(f"{operation} raised {type(found).__name__}")
                raise found
            self._answer(*found)

    def serve(self) -> None:
        """Answers until the other process is gone."""
        with contextlib.suppress(Lost):
            while True:
                _, found = self._receive(Cells())
                self._answer(*found)

    def _send(self, frame: bytes) -> None:
        try:
            self._channel.write(frame)
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> Lost:
        if self.failure is None:
            gone = isinstance(error, EOFError | OSError)
            self.failure = "" if gone else f"its messages cannot be read: {type(error).__name__}: {error}"
        return Lost(self.failure)

    def _receive(self, cells: Cells) -> tuple[str, Any]:
        """The next message: a request as arguments of `_answer`, or the result or error of our own request."""
        if self.failure is not None:
            raise Lost(self.failure)
        try:
            kind, head, encoded, contents = self._channel.read()
            if kind == "ask":
                cells = Cells()
            self._fill(cells, contents)
            values = self._decode_all(encoded, cells)
            match kind, head, values:
                case "ask", [operation, *names], _:
                    cells.remember()
                    split = len(values) - len(names)
                    return kind, (operation, values[:split], dict(zip(names, values[split:], strict=True)), cells)
                case "answer", [], [value]:
                    return kind, value
                case "error", [], [error, arguments, name]:
                    return kind, _error(error, arguments, name)
            raise ValueError("neither a request nor an answer")
        except Exception as error:
            raise self._lost(error) from None

    def _answer(self, operation: Any, args: list[Any], kwargs: dict[str, Any], cells: Cells) -> None:
        try:
            if operation not in OPERATIONS or not self._may(operation, args[0], args[1:]):
                raise PermissionError(f"a program may not do {operation} with this object of its tests")
            result = OPERATIONS[operation](*args, **kwargs)
            # Tests that instantiate a program's class need its methods, even if it extends a builtin.
            made = operation == "call" and isinstance(args[0], type) and args[0].__module__ == "__main__"
            has_methods = made and not hasattr(args[0], "_fields")
            encoded = ["mine", self.export(result)] if has_methods else self._encode(result, cells)
            frame = self._frame("answer", [], [encoded], cells)
        except Exception as error:
            kind, name = type(error), type(error).__name__
            cells.forget_new()
            try:
                frame = self._frame("error", [], self._encode_all([kind, _arguments(error), name], cells), cells)
            except Exception:
                frame = self._frame("error", [], self._encode_all([RuntimeError, (name,), name], Cells()), Cells())
        self._send(frame)

    def _frame(self, kind: str, head: list[str], encoded: list[Any], cells: Cells) -> bytes:
        """A message that includes the contents of new and changed containers."""
        contents, index = [], 0
        while index < len(cells.objects):
            if cells.has_changed(index):
                name, parts = cells.parts(index)
                contents.append([index, name, self._encode_all(parts, cells)])
            index += 1
        return self._channel.frame([kind, head, encoded, contents])

    def _encode_all(self, values: list[Any], cells: Cells, depth: int = 0) -> list[Any]:
        kinds = {*map(type, values)}
        if kinds <= _PLAIN or (kinds == {int} and min(values) > -_SMALL and max(values) < _SMALL):
            return values
        return [self._encode(value, cells, depth) for value in values]

    def _encode(self, value: Any, cells: Cells, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _PLAIN or (kind is int and -_SMALL < value < _SMALL):
            return value
        if kind is Proxy and value._proxy_ask == self.ask:
            return ["yours", value._proxy_number]
        if depth > _NESTING:
            raise RecursionError("tuples are nested too deeply")
        if isinstance(value, type):
            return self._encode_type(value)
        if name := codec_name(kind):
            if CODECS[name].fill is not None:
                return ["cell", cells.index(value)]
            return [name, *self._encode_all([*CODECS[name].parts(value)], cells, depth + 1)]
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            plain = float(value) if kind.__name__ == "longdouble" else value.item()
            if type(plain) is not kind:
                return self._encode(plain, cells, depth + 1)
        return ["mine", self.export(value)]

    def _encode_type(self, kind: type) -> list[Any]:
        name = name_of(kind)
        if name in TYPES and type_of(name) is kind:
            return ["type", name]
        for number, error in self._errors.items():
            if error is kind:
                return ["yours", number]
        if issubclass(kind, Exception):
            return ["error", self.export(kind), kind.__name__, name_of(_known_base(kind))]
        return ["mine", self.export(kind)]

    def _fill(self, cells: Cells, contents: list[Any]) -> None:
        for index, name, parts in contents:
            if index == len(cells.objects):
                cells.index(CODECS[name].empty(type_of(name), parts))
            if codec_name(type(item_of(cells.objects, index))) != name:
                raise ValueError("a container of another type")
        for index, name, parts in contents:
            if (fill := CODECS[name].fill) is None:
                raise ValueError("not a container")
            fill(item_of(cells.objects, index), self._decode_all(parts, cells))

    def _decode_all(self, encoded: list[Any], cells: Cells, depth: int = 0) -> list[Any]:
        if {*map(type, encoded)} <= _PLAIN | {int}:
            return encoded
        return [self._decode(value, cells, depth) for value in encoded]

    def _decode(self, encoded: Any, cells: Cells, depth: int = 0) -> Any:
        if type(encoded) in _PLAIN or type(encoded) is int:
            return encoded
        if type(encoded) is not list or depth > _NESTING + 1:
            raise ValueError("neither plain nor a list with a tag, or nested too deeply")
        match encoded:
            case ["cell", index]:
                return item_of(cells.objects, index)
            case ["yours", number]:
                return item_of(self._exports, number)
            case ["mine", number]:
                return self.proxy(number)
            case ["type", name]:
                return type_of(name)
            case ["error", number, name, base]:
                if number not in self._errors:
                    self._errors[number] = type(str(name), (type_of(base),), {"__module__": "builtins"})
                return self._errors[number]
            case [name, *parts] if CODECS[name].fill is None:
                return CODECS[name].make(type_of(name), self._decode_all(parts, cells, depth + 1))
        raise ValueError(f"no such tag: {str(encoded[:1])[:80]}")


def _known_base(kind: type) -> type:
    return next(base for base in kind.__mro__ if name_of(base) in TYPES)


def _arguments(error: Exception) -> tuple[Any, ...]:
    """Arguments that make an equal exception; its text, if its class defines its own `__str__`."""
    kind = type(error)
    return error.args if kind.__str__ is _known_base(kind).__str__ else (str(error),)


def _error(kind: Any, arguments: Any, name: Any) -> Exception:
    """An exception of the other process; RuntimeError if it cannot be made from these arguments."""
    with contextlib.suppress(Exception):
        error = kind(*arguments)
        if isinstance(error, Exception):
            return error
    return RuntimeError(str(name))
