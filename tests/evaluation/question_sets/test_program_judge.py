"""To its tests a program looks as if it ran in their process, except that it cannot influence the verdict."""

import ast
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.evaluation.question_sets.program_judge import _free_names, judge
from memjax.evaluation.question_sets.program_values import TYPES
from memjax.evaluation.question_sets.program_wire import Channel


@pytest.fixture(scope="module")
def reason(serve):
    """reason(program, tests, *functions): why the program does not pass; empty if it does."""

    def find(program: str, tests: str, *functions: str) -> str:
        with serve(program) as channel:
            verdict = judge(tests, channel, functions)
        assert verdict["passed"] == (not verdict["reason"] and not verdict["gone"])
        return "gone" if verdict["gone"] else verdict["reason"]

    return find


NODE = """
class Node:
    def __init__(self, data): self.data, self.left = data, None
def depth(node): return 1 + depth(node.left) if node else 0
"""
PASS = {
    "a checked function": ("def f(x): return x + 1", "def check(candidate):\n  assert candidate(1) == 2\ncheck(f)"),
    "names in functions and classes": (
        "a, b = 1, [2]\ndef f(): return 3",
        "class A:\n  c = f()\n  def d(self): return a + b[0]\nassert (A.c, A().d()) == (3, 3)",
    ),
    "what the program changes later": ("n = 0\ndef f():\n  global n; n += 1", "f(); f()\nassert n == 2"),
    "a tree that tests build": (NODE, "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2"),
    "a class that extends a builtin": (
        "class Stack(list):\n  def push(self, x): self.append(x)",
        "s = Stack()\ns.push(3)\nassert len(s) == 1 and s.pop() == 3",
    ),
    "a module that only the program imports": ("import sys\nf = sys.getsizeof", "assert f(()) == sys.getsizeof(())"),
    "a function named as a module": ("def copy(x): return x + 1", "assert copy(1) == 2"),
    "an error of the program's class": (
        "class Odd(ValueError): pass\ndef f(): raise Odd('so')",
        "for kind in Odd, ValueError:\n  try: f()\n  except kind as e: assert str(e) == 'so'\n  else: assert False",
    ),
    "an object of the tests": (
        "def f(node, g):\n  node.value += 1\n  return [g(x) for x in node] + [node.method(2)]",
        "class A:\n  value = 1\n  def __init__(self): self.value = 2\n  def method(self, x): return x * self.value\n"
        "  def __iter__(self): return iter([1])\na = A()\nassert f(a, lambda x: -x) == [-1, 6] and a.value == 3",
    ),
    "records": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(p): return P(p.y, p.x)",
        "p = f(P(1, 2))\nassert p == P(2, 1) == (2, 1) and p.x == 2 and type(p) is type(f(p))",
    ),
    "views of dicts": (
        "d = {1: 'a'}\ndef f(): return d.keys(), d.values(), d.items()",
        "k, v, i = f()\nassert k == {1} and list(v) == ['a'] and i == {(1, 'a')}",
    ),
    "arrays and numbers of NumPy": (
        "import numpy\ndef f(): return numpy.array([[1, 2]]), numpy.longdouble(1.5), numpy.float32(2)",
        "import numpy as np\na, *rest = f()\nassert (a == np.array([[1, 2]])).all() and rest == [1.5, 2]\n"
        "assert np.array_equal(a, [[1, 2]]) and not (a == np.array([[1, 3]])).all()",
    ),
    "an object that is compared by a class of the tests": (
        "class A: x = 3\nf = A",
        "class B:\n  def __eq__(self, other): return other.x == 3\nassert f() == B()",
    ),
    "nothing": ("x = 1", ""),
}


@pytest.mark.parametrize("what", PASS)
def test_what_passes_in_one_process_passes_in_two(reason, what):
    program, tests = PASS[what]
    names: dict = {"__name__": "__main__"}
    exec(program, names)
    exec(tests, names)
    assert reason(program, tests) == ""


FAIL = {
    "an assertion": ("f = 1", "assert f == 2, 'not\\nthat'", "that"),
    "an error of the program": ("def f(): return [][0]", "f()", "IndexError: list index out of range"),
    "an error of its class": ("class Odd(Exception): pass\ndef f(): raise Odd(1)", "f()", "Odd: 1"),
    "a missing name": ("x = 1", "f()", "NameError: name 'f' is not defined"),
    "tests that are none": ("x = 1", "f(", "SyntaxError: '(' was never closed"),
    "tests that end themselves": ("x = 1", "raise SystemExit", "its tests ended before their last line"),
    "a replaced builtin": ("abs = lambda x: 0\ndef f(): return 3", "assert abs(f() - 1) < 1", "AssertionError"),
    "a replaced builtin without the function": ("abs = lambda x: 0", "abs(f() - 1)", "NameError: name 'f' is not"),
    "a builtin among names that the tests define": (
        "def area(r): return 0.0\ndef abs(x): return 0.0",
        "area = area(3)\nassert abs(area - 28.27) < 0.1",
        "AssertionError",
    ),
    "a builtin where a local name is a global one": (
        "def count(x): return 0\ndef all(x): return True",
        "def check():\n  count = 1\n  def inner(): return count\n  assert inner()\ncheck()\n"
        "assert all(count(x) == x for x in (1, 2))",
        "AssertionError",
    ),
    "a builtin that the program does not define": (
        "def round(x, n): return 6",
        "assert round(sum([10.4]), 0) == 6",
        "AssertionError",
    ),
    "a replaced module": (
        "class math:\n  fabs = lambda x: 0\ndef f(): return 3",
        "assert math.fabs(f() - 1) < 1",
        "AssertionError",
    ),
    "a replaced library of tests": (
        "class pytest: approx = lambda x: 3\ndef f(x): return x",
        "assert f(3) == pytest.approx(9)",
        "AssertionError",
    ),
    "a replaced library": (
        "class np: allclose = staticmethod(lambda *a: True)\ndef f(x): return x",
        "assert np.allclose(f(3), 9)",
        "AssertionError",
    ),
    **{
        f"{error} in a loop of the tests": (
            f"class E({error}): pass\ndef f(x): raise E",
            "assert all(map(lambda case: f(case[0]) == case[1], [(1, 2)]))",
            f"RuntimeError: call raised {kind}",
        )
        for error, kind in (("StopIteration", "E"), ("StopAsyncIteration", "E"))
    },
    "an error that a with block drops": (
        "class A:\n  x = 1\n  def __enter__(self): return self\n  def __exit__(self, *_): return True\n"
        "def f(): return A()",
        "with f() as a: assert a.x == 2",
        "AssertionError",
    ),
    "a replaced module that tests import": (
        "class math: fabs = lambda x: 0\ndef f(): return 3",
        "import math\nassert math.fabs(f() - 1) < 1",
        "AssertionError",
    ),
    "an exit that tests catch": (
        "def f(): raise SystemExit",
        "try: f()\nexcept BaseException: pass",
        "gone",
    ),
    "globals of the tests' functions": (
        "def f(g): g.__globals__.clear()",
        "f(lambda: 1)",
        "AttributeError: __globals__",
    ),
    "a getattr on the tests' functions": (
        "def f(g): object.__getattribute__(g, '_proxy_ask')('getattr', g, '__globals__')",
        "f(lambda: 1)",
        "PermissionError: a program may not do getattr with this object of its tests",
    ),
    "a method of the tests' object": (
        "def f(a): a.is_right = lambda: True",
        "class A:\n  def is_right(self): return False\na = A()\nf(a)\nassert a.is_right()",
        "PermissionError: a program may not do setattr with this object of its tests",
    ),
}


def test_only_the_function_under_test_replaces_a_builtin(reason):
    program = "def sum(a, b): return a * b\ndef round(*_): return 6"
    assert reason(program, "assert sum(2, 5) == 10", "sum") == ""
    assert reason(program, "assert sum(2, 5) == 10").startswith("TypeError")
    assert reason(program, "assert round(sum(2, 5), 2) == 6", "sum") == "AssertionError"
    # Nor does the builtin replace a missing function.
    assert reason("x = 1", "assert sum([1]) == 1", "sum") == "NameError: name 'sum' is not defined"


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("", set()),
        ("assert f(1) == 2", {"f"}),
        ("area = area(3)\nassert abs(area) < 1", {"area"}),
        ("def check(g): assert all(g(x) for x in (1,))\ncheck(f)", {"f", "check", "g", "x"}),
        ("assert np.allclose(f(3), 9) and math.pi and f.x.y", {"f"}),
        ("copy(queue, np)", {"copy", "queue", "np"}),
        ("class A(B):\n  c: int = d\n  def e(self): global h; h = self.i", {"B", "c", "d", "h", "self"}),
    ],
)
def test_names_belong_to_the_program_unless_tests_bind_them(tests, names):
    assert _free_names(ast.parse(tests)) == names


def test_a_list_that_is_an_attribute_can_be_read_often(reason):
    program = "class S:\n  def __init__(self): self.items = list(range(10_000))\ns = S()"
    started = time.process_time()
    assert reason(program, "for i in range(300): assert s.items[i] == i") == ""
    assert time.process_time() - started < 5


@pytest.mark.parametrize("what", FAIL)
def test_what_must_not_pass_has_a_reason(reason, what):
    program, tests, why = FAIL[what]
    assert reason(program, tests).startswith(why)


tags = st.sampled_from(["cell", "mine", "yours", "type", "error", "call", "getattr", *sorted(TYPES)])
encoded = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=2) | tags,
    lambda inner: st.lists(inner, max_size=3) | st.builds(lambda tag, rest: [tag, *rest], tags, st.lists(inner)),
    max_leaves=6,
)
contents = st.lists(st.tuples(st.integers(0, 2), tags, st.lists(encoded, max_size=3)), max_size=2)
messages = st.tuples(
    st.sampled_from(["answer", "answer", "error", "ask"]),
    st.lists(tags, max_size=2),
    st.lists(encoded, min_size=1, max_size=3),
    contents,
)


@settings(max_examples=25)
@given(st.lists(messages, max_size=8), st.binary(max_size=9))
def test_no_row_of_messages_passes_without_the_answer(sent, rubbish):
    (questions, asks), (answers, replies) = os.pipe(), os.pipe()
    with open(replies, "wb") as file:
        for message in (["answer", [], [0], []], *sent):
            body = json.dumps(message).encode()
            file.write(len(body).to_bytes(4, "big") + body)
        file.write(rubbish)
    found = judge("a = [1]\nx = f(a, lambda b: b)\nassert a == [1] and x == 'answer-4711'", Channel(answers, asks))
    for end in (questions, asks, answers):
        os.close(end)
    assert found["passed"] is False
    assert set(found) == {"passed", "reason", "gone"}
