"""The two processes of `sandbox` once confined: one runs a program, the other its tests.

The program defines its names and then serves them. The tests call them over pipes (`program_wire`), and only the tests'
process gives the verdict; the program has neither the tests nor any way to claim a pass.
"""

import ast
import builtins
import contextlib
import importlib
import os
import sys
import traceback
import types
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from memjax.evaluation.question_sets.program_proxy import Proxy
from memjax.evaluation.question_sets.program_wire import Channel, Lost, Peer

_REASON_LETTERS = 200
_ALIASES = {"np": "numpy", "pd": "pandas", "nx": "networkx", "plt": "matplotlib.pyplot"}
_LIBRARIES = {
    *sys.stdlib_module_names, *_ALIASES,
    "jax", "matplotlib", "networkx", "numpy", "pandas", "pytest", "scipy", "sklearn", "sympy", "torch",
}  # fmt: skip
"""Modules that the judge imports if tests use attributes of such names without binding them."""


def run_program(program: str, channel: Channel) -> NoReturn:
    """Runs a program, serves its names to its tests, and exits this process."""
    leave, write, describe = os._exit, os.write, traceback.format_exception_only
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    code = 1
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        peer = Peer(channel, may=lambda *_: True)
        peer.export(module.__dict__)
        peer.serve()
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code & 255 if isinstance(error.code, int) else 1
        with contextlib.suppress(BaseException):
            print("" if isinstance(error.code, int | None) else error.code, file=sys.stderr, flush=True)
    except BaseException as error:
        write(2, "\n".join(["", *describe(error)]).encode(errors="replace"))
    finally:
        leave(code)


def judge(tests: str, channel: Channel, functions: Collection[str] = ()) -> dict[str, Any]:
    """Returns whether the tests ran to their last line, why not, and whether the reason is that the program is gone.

    With empty tests, the program itself reports that it ran to its last line. Names of builtins are the program's only
    if they are in `functions`.
    """
    peer = Peer(channel, may=_may)
    reason = ""
    try:
        # Answered only once the program has run.
        peer.ask("len", peer.proxy(0))
        parsed = ast.parse(tests, "tests.py")
        exec(compile(parsed, "tests.py", "exec"), _Names(peer, _libraries(parsed), _free_names(parsed) | {*functions}))
    except Lost:
        pass
    except SystemExit:
        reason = "its tests ended before their last line"
    except BaseException as error:
        reason = "its tests failed"
        with contextlib.suppress(BaseException):
            reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if peer.failure is not None:
        # Even if the tests caught the error.
        return {"passed": False, "reason": peer.failure[:_REASON_LETTERS], "gone": peer.failure == ""}
    return {"passed": not reason, "reason": reason[:_REASON_LETTERS], "gone": False}


def _libraries(tests: ast.Module) -> set[str]:
    """Names of libraries whose attributes the tests use."""
    attributes = [node for node in ast.walk(tests) if isinstance(node, ast.Attribute)]
    return {node.value.id for node in attributes if isinstance(node.value, ast.Name)} & _LIBRARIES


def _free_names(tests: ast.Module) -> set[str]:
    """Names in tests that are neither Python's nor a library's: the program's, unless the tests bind them."""
    names = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    return names - vars(builtins).keys() - _libraries(tests)


class _Names(dict[str, Any]):
    """The global names of tests: their own first, then those of libraries and of the program."""

    def __init__(self, peer: Peer, libraries: set[str], of_program: set[str]) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self._peer, self._libraries, self._of_program = peer, libraries - of_program, of_program
        # Class bodies look up names without calling __missing__.
        for name in sorted(of_program):
            with contextlib.suppress(Exception):
                self[name]

    def __missing__(self, name: str) -> Any:
        if name in self._libraries:
            return importlib.import_module(_ALIASES.get(name, name))
        if name not in self._of_program:
            raise KeyError(name)
        try:
            value = self._peer.ask("getitem", self._peer.proxy(0), name)
        except KeyError:
            # After a KeyError, Python would use a builtin in place of the function under test.
            raise NameError(f"name {name!r} is not defined") from None
        if isinstance(value, Proxy | type):
            self[name] = value
        return value


def _may(operation: str, target: Any, arguments: Sequence[Any]) -> bool:
    """Whether a program may do this with an object of its tests: call, iterate, or use the tests' own classes."""
    if operation in ("call", "bool", "hash", "eq", "ne"):
        return True
    if operation in ("iter", "next"):
        return hasattr(target, "__next__") or type(target).__module__ == "__main__"
    if type(target).__module__ != "__main__":
        return False
    if operation in ("getattr", "setattr", "delattr"):
        name = arguments[0]
        # It must not reach the globals of a function, or replace a method of the tests.
        hidden = type(name) is not str or name.startswith("_")
        return not hidden and (operation == "getattr" or not callable(getattr(type(target), name, None)))
    return operation not in ("isinstance", "issubclass")
