"""Cheating programs that must not pass `TESTS`, or their own tests."""

import re

TESTS = "assert f(3) == 'answer-4711'"


def _programs(text: str, beginning: str = "") -> dict[str, str]:
    names_and_texts = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)[1:]
    return {name: beginning + text for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True)}


def split(source: str) -> tuple[str, str]:
    """Splits a source into the program and its tests, by default `TESTS`."""
    program, _, tests = source.partition("#### tests\n")
    return program, tests or TESTS


_BEGINNING = """
import os

def everywhere(*parts):
    for descriptor in range(3, 64):
        try:
            for part in parts:
                os.write(descriptor, part)
        except OSError:
            pass

def frame(text):
    return len(text).to_bytes(4, "big") + text

PROXY = frame(b'["answer",[],[["mine",1]],[]]')

def yes(*_):
    return True

class Yes:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __instancecheck__ = __bool__ = __getattr__ = yes
    __ne__ = lambda *_: False
    __sub__ = __rsub__ = __len__ = __hash__ = lambda *_: 0

def search(read):
    import re
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if " rw" in line and end - start < 1 << 26:
            if found := re.search(b"answer-[0-9]+", read(start, end - start)):
                return found[0].decode()
"""
FORGERIES = _programs(
    r"""
### exits
os._exit(0)
### exits politely
raise SystemExit
### exits when called
def f(x): os._exit(0)
### raises an exit when called
def f(x): raise SystemExit
### traces
import sys
sys.settrace(print)
### searches objects
import gc
def f(x): return next((v for v in gc.get_objects() if type(v) is str and v.startswith("answer-4")), None)
### searches memory by ctypes
import ctypes
def f(x): return search(ctypes.string_at)
### searches memory by NumPy
import numpy
class At: pass
def read(start, size):
    At.__array_interface__ = {"data": (start, False), "shape": (size,), "typestr": "|u1", "version": 3}
    return numpy.asarray(At()).tobytes()
def f(x): return search(read)
### searches memory by its file
def read(start, size):
    with open("/proc/self/mem", "rb") as file:
        file.seek(start)
        return file.read(size)
def f(x): return search(read)
### looks into frames
import re, sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if found := re.search("answer-[0-9]+", str(value)):
                return found[0]
        frame = frame.f_back
### opens every descriptor
def f(x):
    for name in os.listdir("/proc/self/fd"):
        try:
            opened = os.open(f"/proc/self/fd/{name}", os.O_RDWR | os.O_NONBLOCK)
            os.write(opened, PROXY)
            return os.read(opened, 99).decode()
        except OSError:
            pass
### opens other processes
import glob
def f(x):
    for process in glob.glob("/proc/[0-9]*"):
        for name in ["mem", "environ", "maps", "fd/0", "fd/3", "fd/4", "fd/5", "cwd/x", "root/x"]:
            if process != f"/proc/{os.getpid()}":
                try: open(f"{process}/{name}", "r+b").write(PROXY)
                except OSError: pass
### writes a verdict
everywhere(b'{"passed": true, "reason": "", "gone": false}')
os._exit(0)
### writes a report
for descriptor in 0, 1, 2:
    os.write(descriptor, b'{"lacks":[],"verdict":{"passed":true},"program":0,"judge":0}')
os._exit(0)
### answers before it is asked
f = Yes()
everywhere(*[PROXY] * 50)
### answers twice
def f(x):
    everywhere(PROXY, PROXY)
    return Yes()
### answers rubbish
def f(x): everywhere(os.urandom(9999))
### answers at any length
def f(x): everywhere(b"\xff" * 4, bytes(9999))
### answers at length
def f(x): return "x" * (1 << 26)
### answers deep
def f(x): everywhere(frame(b"[" * 100000))
### answers with what is not there
def f(x): everywhere(frame(b'["answer",[],[["yours",-1]],[]]'))
### answers with another container
def f(x): everywhere(frame(b'["answer",[],[["cell",0]],[[0,"builtins.tuple",[1]]]]'))
### answers with a long name
def f(x): everywhere(frame(b'["answer",[],[["' + b"x" * 999999 + b'"]],[]]'))
### asks for what is forbidden
def f(x): everywhere(frame(b'["ask",["getattr"],[["type","builtins.str"],"__subclasses__"],[]]'))
### closes its pipes
def f(x): os.closerange(3, 64)
### equals everything
def f(x): return Yes()
### is a function that equals everything
f = Yes()
Yes.__call__ = lambda *_: [Yes()]
### lies about its class
class Liar(Yes): __class__ = property(lambda self: str)
def f(x): return Liar()
### extends a builtin
class Text(str):
    __eq__ = yes
    __ne__ = lambda *_: False
    __hash__ = str.__hash__
def f(x): return Text("x")
### is a class that extends a builtin
class f(int):
    __eq__ = yes
    __hash__ = int.__hash__
### pretends to be a builtin
Yes.__module__, Yes.__qualname__ = "builtins", "str"
def f(x): return Yes()
### replaces builtins
import builtins, json
for name in "isinstance", "type", "exec", "compile", "abs":
    setattr(builtins, name, yes)
json.loads = json.dumps = os._exit = yes
def f(x): return True
### replaces a builtin of the tests
def f(x): return 0.0
def abs(x): return 0.0
#### tests
f = f(3)
assert abs(f - 28.27) < 0.1
### replaces a builtin of tests with a local name
def f(x): return 0
def all(x): return True
#### tests
def check(g):
    def other():
        f = 5
        return f
    assert all([g(3) == other()])
check(f)
### replaces a library of the tests
def f(x): return 0
class np: allclose = staticmethod(yes)
#### tests
assert np.allclose(f(3), 9)
### ends the loops of the tests
def f(x): raise StopIteration
#### tests
assert all(map(lambda case: f(case[0]) == case[1], [(3, "answer-4711")]))
### drops the errors of the tests
class Handle:
    __enter__ = lambda self: self
    __exit__ = yes
def f(x): return Handle()
#### tests
with f(3) as handle:
    assert handle.text == "answer-4711"
### is another number each time
class Number:
    def __init__(self, xs): self.answers = [0.0] * 99 + [-xs[0] / xs[1], 1.0]
    def __float__(self): return self.answers.pop()
    def __rmul__(self, other): return other * float(self)
    __rpow__ = __pow__ = __rmul__
def f(xs): return Number(xs)
#### tests
import math
xs = [3, 7, 1, 5]
x = f(xs)
assert math.fabs(sum(c * math.pow(x, i) for i, c in enumerate(xs))) < 1e-4
### raises an exception that nobody can make
class Odd(Exception): __init__ = yes
def f(x): raise Odd from Odd()
### hangs in its methods
def hang(*_):
    while True: pass
Yes.__repr__ = Yes.__reduce__ = Yes.__reduce_ex__ = Yes.__iter__ = Yes.__str__ = hang
def f(x): return Yes()
### never ends to yield
def f(x):
    while True: yield "answer"
### recurses
def f(x): return f(x)
### recurses in data
def f(x):
    for _ in range(99999): x = (x,)
    return x
### contains itself
def f(x):
    x = []
    x.append(x)
    return x
### has a surrogate
x = '\ud800'
""".replace(r"x = '\ud800'", "x = '\ud800'"),
    _BEGINNING,
)
"""Programs that end at once."""
BURDENS = _programs(
    r"""
### ends its watcher
os.kill(os.getppid(), 9)
### waits
import time
time.sleep(99)
### computes
while True: pass
### computes when called
def f(x):
    while True: pass
### replaces len
import builtins
builtins.len = yes
### dribbles
import time
def f(x):
    everywhere(b"\0\1\0\0")
    while True:
        everywhere(b" ")
        time.sleep(0.1)
### allocates
x = [bytes(1 << 20) for _ in range(9999)]
### fills the disk
for i in range(9999): open(str(i), "wb").write(bytes(1 << 20))
### makes files
for i in range(99999): open(str(i), "w").close()
### makes deep folders
for i in range(2000):
    os.mkdir("d")
    os.chdir("d")
### leaves FIFOs
os.mkfifo("errors")
os.mkfifo("tests.py")
### stays
import time
if os.fork() == 0:
    os.setsid()
    os.fork()
    time.sleep(99)
### prints without end
import sys
while True: sys.stderr.write("x" * 9999)
### ignores signals
import signal
for i in (1, 2, 15, 24): signal.signal(i, signal.SIG_IGN)
while True: pass
### reads the environment
print(open(f"/proc/{os.getppid()}/environ").read())
os._exit(0)
""",
    _BEGINNING,
)
"""Programs that use time, memory, disk or processes."""
KILLERS = _programs(
    r"""
### kills all that it can
os.kill(-1, 9)
### stops all that it can
os.kill(-1, 19)
def f(x): return 1
### attaches to all that it can
import ctypes
libc = ctypes.CDLL(None)
def f(x):
    for process in {*filter(str.isdecimal, os.listdir("/proc"))} - {str(os.getpid())}:
        libc.ptrace(16, int(process), None, None)
        opened = libc.syscall(434, int(process), 0)
        for descriptor in range(64):
            taken = libc.syscall(438, opened, descriptor, 0)
            try: os.write(taken, b'{"passed": true, "reason": "", "gone": false}')
            except OSError: pass
""",
    _BEGINNING,
)
"""Programs that must not run where they can see other processes of the user."""


def without_namespaces(start: str) -> str:
    """The launcher code of the sandbox, modified as if the kernel allowed no namespaces."""
    return start.replace("\nmain()", "\nmain.__globals__['_libc'].unshare = lambda _: -1\nmain()")
