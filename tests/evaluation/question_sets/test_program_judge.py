"""Tests see a program as if it ran in their process, but for what would let it decide its verdict."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.evaluation.question_sets.program_judge import judge
from memjax.evaluation.question_sets.program_values import TYPES
from memjax.evaluation.question_sets.program_wire import Channel


@pytest.fixture(scope="module")
def reason(serve):
    """Why a program does not pass its tests; empty if it does."""

    def find(program: str, tests: str) -> str:
        with serve(program) as channel:
            verdict = judge(tests, channel)
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
    "a function named as a builtin": ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    "a module of the program": ("import sys\nf = sys.getsizeof", "assert f(()) == sys.getsizeof(())"),
    "a class named as its module": (
        "from datetime import datetime\ndef f(): return datetime(2020, 1, 2)",
        "assert f() == datetime.strptime('2020-01-02', '%Y-%m-%d')",
    ),
    "an error of the program's class": (
        "class Odd(ValueError): pass\ndef f(): raise Odd('so')",
        "for kind in Odd, ValueError:\n  try: f()\n  except kind as e: assert str(e) == 'so'\n  else: assert False",
    ),
    "an object of the tests": (
        "def f(node, g):\n  node.value += 1\n  return [g(x) for x in node] + [node.method(2)]",
        "class A:\n  value = 1\n  def __init__(self): self.value = 2\n  def method(self, x): return x * self.value\n"
        "  def __iter__(self): return iter([1])\na = A()\nassert f(a, lambda x: -x) == [-1, 6] and a.value == 3",
    ),
    "containers of the program's objects": (
        "seen = {}\nclass Node:\n  def __init__(self, x): self.x, self.children = x, []\n"
        "def count(n): return 1 + sum(map(count, n.children)) + len(seen)",
        "root = Node(1)\nroot.children.append(Node(2))\nroot.children[0].children.append(Node(3))\nseen['a'] = [1]\n"
        "assert count(root) == 6 and [n.x for n in root.children] == [2] and seen == {'a': [1]}",
    ),
    "containers of the tests' objects": (
        "def f(a):\n  a.items.append(1)\n  a.items += [[2]]",
        "class A: items = []\na = A()\nb = a.items\nf(a)\nassert a.items == b == [1, [2]]",
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
    "a replaced module": (
        "class math:\n  fabs = lambda x: 0\ndef f(): return 3",
        "assert math.fabs(f() - 1) < 1",
        "NameError: name 'math' is not defined",
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


@pytest.mark.parametrize("what", FAIL)
def test_what_must_not_pass_is_a_reason(reason, what):
    program, tests, why = FAIL[what]
    assert reason(program, tests).startswith(why)


tags = st.sampled_from(["cell", "mine", "yours", "type", "module", "error", "math", "call", "getattr", *sorted(TYPES)])
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
    st.lists(st.tuples(st.integers(0, 1), contents), max_size=1),
)


@settings(max_examples=25)
@given(st.lists(messages, max_size=8), st.binary(max_size=9))
def test_no_row_of_messages_passes_without_the_answer(sent, rubbish):
    (questions, asks), (answers, replies) = os.pipe(), os.pipe()
    with open(replies, "wb") as file:
        for message in (["ready"], *sent):
            body = json.dumps(message).encode()
            file.write(len(body).to_bytes(4, "big") + body)
        file.write(rubbish)
    found = judge("a = [1]\nx = f(a, lambda b: b)\nassert a == [1] and x == 'answer-4711'", Channel(answers, asks))
    for end in (questions, asks, answers):
        os.close(end)
    assert found["passed"] is False
    assert set(found) == {"passed", "reason", "gone"}
