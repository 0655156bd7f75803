"""A proxy in one process for an object in the other; every operation on it is a request."""

import operator
from collections.abc import Callable
from typing import Any

_VISIBLE_DUNDERS = ("__name__", "__qualname__", "__doc__", "__dict__")


class Proxy:
    """An object of the other process, which never equals data of this one, whatever it claims.

    Nor can it be ordered against data, added to it or converted to a number: such a request would reveal the value that
    the tests expect, and the answer could differ each time. Operations between two proxies run in the other process.
    """

    __slots__ = ("_proxy_ask", "_proxy_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_proxy_ask", ask)
        object.__setattr__(self, "_proxy_number", number)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the object in its process."""
        return self._proxy_ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A library that reads __array_interface__, __fspath__ and the like would trust what the other process says.
        if name.startswith("__") and name.endswith("__") and name not in _VISIBLE_DUNDERS:
            raise AttributeError(name)
        return self._proxy_ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy_ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._proxy_ask("delattr", self, name)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("an object of the other process cannot be copied")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Proxy) and self._proxy_ask("isinstance", value, self) is True

    def __subclasscheck__(self, kind: object) -> bool:
        return isinstance(kind, Proxy) and self._proxy_ask("issubclass", kind, self) is True

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # Its answer is ignored: a true value would suppress the error of an assertion.
        self._proxy_ask("exit", self, kind)


_UNARY: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (len, iter, next, reversed, str, repr, format, bool, hash)},
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "enter": lambda value: type(value).__enter__(value),
}
"""Operations on one object, with keys or options.

Conversions to numbers are missing because their answers could differ each time, `contains` because it would reveal what
the tests expect.
"""
_BINARY: dict[str, Callable[..., Any]] = {
    name: getattr(operator, f"__{name}__") for name in (
        "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
        "and", "or", "xor", "lshift", "rshift",
    )
}  # fmt: skip
OPERATIONS: dict[str, Callable[..., Any]] = {
    **_UNARY,
    **_BINARY,
    **{kind.__name__: kind for kind in (getattr, setattr, delattr, isinstance, issubclass)},
    "call": lambda value, /, *args, **kwargs: value(*args, **kwargs),
    "exit": lambda value, kind: type(value).__exit__(value, kind, None, None),
}
"""The operations done in the object's process, by the name of the request."""


def _unary(name: str) -> Callable[..., Any]:
    return lambda self, *args: self._proxy_ask(name, self, *args)


def _binary(name: str) -> Callable[..., Any]:
    return lambda self, other: self._proxy_ask(name, self, other) if isinstance(other, Proxy) else NotImplemented


for _name in _UNARY:
    setattr(Proxy, f"__{_name}__", _unary(_name))
for _name in _BINARY:
    setattr(Proxy, f"__{_name}__", _binary(_name))
