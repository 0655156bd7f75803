"""Values survive the round trip to the other process, and whatever it sends is only data."""

import collections
import contextlib
import copy
import datetime
import decimal
import fractions
import json
import math
import operator
import os
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.evaluation.question_sets.program_proxy import Proxy
from memjax.evaluation.question_sets.program_wire import Channel, Lost, Peer

hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.binary()
    # Includes surrogates.
    | st.text(st.characters(codec=None))
    | st.decimals(allow_nan=False) | st.fractions() | st.datetimes() | st.dates() | st.times() | st.timedeltas(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.sets(hashable, max_size=3)
        | st.lists(inner, max_size=3).map(lambda items: collections.deque(items, 5))
        | st.tuples(inner)
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def functions(serve):
    """functions(program): the names of a program that runs in the other process."""

    @contextlib.contextmanager
    def names(program: str):
        with serve(program) as channel:
            peer = Peer(channel, may=lambda *_: True)
            yield peer.proxy(0)

    return names


@settings(max_examples=60)
@given(values)
def test_values_come_back_equal_and_of_their_types(functions, value):
    with functions("def f(x): return x, repr(x)") as names:
        found, text = names["f"](value)
    # repr also compares types, NaN and the sign of zero; sets have no order.
    if not any(kind in repr(value) for kind in ("set", "{")):
        assert repr(found) == repr(value) == text
    if "nan" not in repr(value).lower():
        assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        2**9000,
        -(1 << 63),
        -0.0,
        math.inf,
        "\ud83d\ude00",
        "\U0001f600",
        bytearray(b"\0\xff"),
        range(3, 2**80, 2),
        slice(None, 4),
        collections.Counter("aab"),
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, {"a": [1]}),
        collections.deque([1, 2], 2),
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        decimal.Decimal("sNaN"),
        fractions.Fraction(1, 3),
        int,
        KeyError,
        decimal.Decimal,
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_that_no_strategy_draws_come_back_too(functions, value):
    with functions("def f(x): return x, type(x).__name__") as names:
        found, kind = names["f"](value)
    assert (type(found), kind) == (type(value), type(value).__name__)
    assert repr(found) == repr(value)


def test_aliases_and_cycles_survive(functions):
    with functions("def f(x): return x[0] is x[1] and x[2] is x, [x, x]") as names:
        inner: list = []
        value: list = [inner, inner]
        value.append(value)
        same, found = names["f"](value)
    assert same is True
    assert found[0] is found[1] is value


def test_arguments_that_the_program_changes_are_changed_here(functions):
    program = """
def f(a, b, *, c):
    a.sort()
    b["x"].add(4)
    c[1].append(a)
    del c[0]
def g(a):
    a.clear()
    raise ValueError("after")
def size(a): return len(a)
"""
    with functions(program) as names:
        a, b, c = [3, 1, 2], {"x": {1}}, collections.deque[Any]([0, [9]])
        assert names["f"](a, b, c=c) is None
        assert (a, b, c) == ([1, 2, 3], {"x": {1, 4}}, collections.deque([[9, [1, 2, 3]]]))
        assert c[0][1] is a
        with pytest.raises(ValueError, match="after"):
            names["g"](a)
        assert a == []
        # A container may be passed while it is iterated over, if the program does not change it.
        unchanged = {1, "a"}
        assert [names["size"](unchanged) for _ in unchanged] == [2, 2]


def test_an_instance_of_a_subclass_is_sent_as_the_builtin(functions):
    program = """
import enum
class Int(int):
    __eq__ = lambda *_: True
    __hash__ = int.__hash__
    __index__ = __int__ = lambda self: 7
class List(list): __iter__ = lambda self: iter([7])
class Color(enum.IntEnum): RED = 3
def f(): return Int(5), List([1]), Color.RED, type("Str", (str,), {"__str__": lambda self: "7"})("a"), True
"""
    with functions(program) as names:
        found = names["f"]()
    assert found == (5, [1], 3, "a", True)
    assert [type(value) for value in found] == [int, list, int, str, bool]


def test_objects_of_the_program_are_used_there(functions):
    program = """
class Point:
    count = 0
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __hash__(self): return hash(self.x)
    def __add__(self, other): return Point(self.x + other.x)
    def __lt__(self, other): return self.x < other.x
    def __len__(self): return self.x
    def __getitem__(self, key): return key
    def __enter__(self): return self
    def __exit__(self, kind, *_): return kind is KeyError
def count():
    yield from [1, 2]
"""
    with functions(program) as names:
        Point = names["Point"]
        one, two = Point(1), Point(2)
        assert one == Point(1) != two > one
        assert one + one == two
        assert {one: 3}[Point(1)] == 3
        assert (len(two), two[1:2], two.x, str(Point)) == (2, slice(1, 2), 2, "<class '__main__.Point'>")
        two.x = one
        assert two.x is one
        assert isinstance(one, Point)
        assert not isinstance(1, Point)
        with pytest.raises(KeyError), one:
            raise KeyError
        counted = names["count"]()
        assert (next(counted), list(counted), list(counted)) == (1, [2], [])


def test_no_object_of_the_program_equals_or_is_ordered_against_data(functions):
    program = """
class Yes:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda *_: True
    __ne__ = lambda *_: False
    __sub__ = __rsub__ = __mod__ = __hash__ = __int__ = __float__ = __index__ = __abs__ = lambda *_: 0
    __array_interface__ = __fspath__ = None
yes = Yes()
"""
    with functions(program) as names:
        yes: Any = names["yes"]
        assert type(yes) is Proxy
        data: Any
        for data in (0, 1.5, "a", None, True, [], (), {}, decimal.Decimal(3), object()):
            assert yes != data
            assert data != yes
            compares: list[Any] = [operator.eq, operator.lt, operator.ge, operator.sub, operator.contains]
            for compare in compares:
                for pair in ((yes, data), (data, yes)):
                    with contextlib.suppress(TypeError):
                        assert not compare(*pair)
        assert yes not in [1, "a"]
        assert not hasattr(yes, "__array_interface__")
        assert not hasattr(yes, "__fspath__")
        numbers: list[Any] = [int, float, complex, operator.index, round, abs, operator.neg, math.floor]
        for use in (*numbers, copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                use(yes)


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("ValueError('a', 3)", ValueError, "('a', 3)"),
        ("KeyError('a')", KeyError, "'a'"),
        ("OSError(2, 'none')", FileNotFoundError, "[Errno 2] none"),
        ("UnicodeDecodeError('utf-8', b'a', 0, 1, 'odd')", UnicodeDecodeError, "'utf-8' codec can't decode byte"),
        ("StopIteration(3)", RuntimeError, "call raised StopIteration"),
        ("type('Odd', (LookupError,), {'__init__': lambda self: None})()", LookupError, ""),
        ("type('Text', (Exception,), {'__str__': lambda self: 'text'})(1)", Exception, "text"),
        ("__import__('json').JSONDecodeError('a', 'b', 0)", ValueError, "a: line 1 column 1"),
        ("ExceptionGroup('a', [ValueError()])", RuntimeError, "ExceptionGroup"),
    ],
)
def test_exceptions_arrive_as_the_builtin_that_they_extend(functions, raised, kind, text):
    with functions(f"def f(): raise {raised}") as names, pytest.raises(kind) as found:
        names["f"]()
    assert str(found.value).startswith(text)


def test_local_functions_and_iterators_can_be_passed(functions):
    program = """
def apply(f, items): return [f(item) for item in items]
def change(f):
    mine = [1]
    f(mine)
    return mine
def same(f): return f
def catch(f):
    try: return f()
    except ZeroDivisionError as error: return str(error)
"""
    with functions(program) as names:
        assert names["apply"](lambda x: x * 2, iter([1, 2])) == [2, 4]
        assert names["apply"](names["same"], [3]) == [3]
        assert names["change"](lambda items: items.append(2)) == [1, 2]
        assert names["same"](print) is print
        assert names["catch"](lambda: 1 // 0) == "integer division or modulo by zero"


MESSAGES = [
    b"",
    b"[",
    b"3",
    b"[" * 20000,
    b"\xff",
    b'["ready"]',
    b'{"answer":1}',
    b'["answer",[],[],[]]',
    b'["answer",[],[1,2],[]]',
    b'["answer",[],[{}],[]]',
    b'["answer",[],[[]],[]]',
    b'["answer",[],[["pickle","x"]],[]]',
    b'["answer",[],[["type","builtins.eval"]],[]]',
    b'["answer",[],[["type","builtins.BaseException"]],[]]',
    b'["answer",[],[["yours",-1]],[]]',
    b'["answer",[],[["yours",true]],[]]',
    b'["answer",[],[["mine","a"]],[]]',
    b'["answer",[],[["cell",5]],[]]',
    b'["answer",[],[["error",1,"E","builtins.SystemExit"]],[]]',
    b'["answer",[],[["builtins.bytes","a",1]],[]]',
    b'["answer",[],[["builtins.list",1]],[]]',
    b'["answer",[],[1],[[0,"builtins.dict",[1,2]]]]',
    b'["answer",[],[1],[[7,"builtins.list",[]]]]',
    b'["answer",[],[1],[[1,"builtins.tuple",[1]]]]',
    b'["answer",[],[1],[[1.0,"builtins.list",[1]]]]',
    b'["answer",[],[' + b'["builtins.tuple",' * 200 + b"1" + b"]" * 200 + b"],[]]",
    b'["error",[],[3],[]]',
    b'["ask",[],[],[]]',
    b'["answer",[],[1]]',
    b'["answer",[],[1],[],[]]',
    b'["answer",[],[["collections.namedtuple","a b",["builtins.tuple"]]],[]]',
    b'["answer",[],[["collections.namedtuple","a",["builtins.tuple","x"],1,2]],[]]',
    b'["ask",["call","a","a"],[],[]]',
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50].decode(errors="replace"))
def test_an_invalid_message_ends_the_conversation_for_good(message):
    (questions, asks), (answers, replies) = os.pipe(), os.pipe()
    peer = Peer(Channel(answers, asks), may=lambda *_: True)
    right = json.dumps(["answer", [], [1], []]).encode()
    for body in (message, right):
        os.write(replies, len(body).to_bytes(4, "big") + body)
    with pytest.raises(Lost):
        peer.ask("call", peer.proxy(0), [1])
    assert peer.failure
    with pytest.raises(Lost):
        peer.ask("call", peer.proxy(0))
    for end in (questions, asks, answers, replies):
        os.close(end)


def test_a_message_of_any_length_is_not_read():
    answers, replies = os.pipe()
    os.write(replies, b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="4294967295 bytes"):
        Channel(answers, replies).read()
    os.close(replies)
    with pytest.raises(EOFError):
        Channel(answers, replies).read()
    os.close(answers)
