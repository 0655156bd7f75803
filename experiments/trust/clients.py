"""Clients that send malformed requests to the HTTP server: odd bodies, heads and chunks, and partial requests."""

import contextlib
import json
import os
import pathlib
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from families import make_run
from fuzz import Attempts, Faults
from mutate import damage, odd_json

SECONDS = 10.0
"""Time within which every request must be answered."""
STALLED_SECONDS = 45.0
"""Time within which the server must drop a client that stops sending."""
MEMORY_BYTES = 64 << 20
"""Maximum growth of the server's memory."""
SOUND = {
    "/v1/completions": {
        **{"prompt": ["a b", "c"], "max_tokens": 2, "temperature": 0.0, "top_p": 0.9, "top_k": 4, "n": 1, "seed": 1},
        **{"min_p": 0.1, "logit_bias": {"5": -1.5, "7": 2}, "stop_token_ids": [9]},
        **{"stop": ["x", "yz"], "logprobs": 2, "echo": True, "stream": False, "model": None, "user": "u"},
    },
    "/tokenize": {"prompt": "a b", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6, 7]},
}


def request(path: str, body: bytes, *, method: str = "POST", version: str = "1.1", **headers: str) -> bytes:
    """The bytes of a request; empty headers are omitted."""
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in lines.items() if value)]
    return "\r\n".join([*head, "", ""]).encode("latin-1", "replace") + body


def hostile(rng: random.Random) -> tuple[str, bytes, bool]:
    """A description, the bytes, and whether the request is complete enough to be answered."""
    path = rng.choice(["/v1/completions"] * 4 + ["/tokenize", "/detokenize"])
    sound = json.dumps(SOUND[path]).encode()
    kind = rng.randrange(10)
    if kind < 5:
        how, text = odd_json(SOUND[path], rng)
        return f"{path} {how}", request(path, text.encode("utf-8", "surrogatepass")), True
    if kind == 5:
        how, body = damage(sound, rng)
        return f"{path} body {how}", request(path, body), True
    if kind == 6:
        how, raw = damage(request(path, sound), rng)
        return f"{path} request {how}", raw, False
    if kind == 7:
        return _large(rng)
    return _head(rng, path, sound)


def _large(rng: random.Random) -> tuple[str, bytes, bool]:
    text, count = rng.choice(["x", "é", " ", "\x00"]), rng.choice([17, 1000, 100_000])
    body: dict[str, Any] = rng.choice(
        [
            {"prompt": text * 10 * count},
            {"prompt": [5] * count},
            {"prompt": [[5]] * count},
            {"prompt": [text] * count},
            {"prompt": "a", "stop": [text * count]},
            {"prompt": "a", "n": count},
            {"prompt": "a", "max_tokens": count},
            {f"field{number}": number for number in range(count)},
            {"prompt": "a", "user": text * count},
        ]
    )
    name, value = list(body.items())[-1]
    return f"large {name} {count} {str(value)[:9]!r}", request("/v1/completions", json.dumps(body).encode()), True


def _head(rng: random.Random, path: str, body: bytes) -> tuple[str, bytes, bool]:
    """Odd request lines and headers, and broken chunks."""
    length = str(len(body))
    chunk = lambda size, data: size + b"\r\n" + data + b"\r\n"
    chunked = request(path, b"", Content_Length="", Transfer_Encoding="chunked")
    size = f"{len(body):x}".encode()
    odd: dict[str, Callable[[], bytes]] = {
        "length too long": lambda: request(path, body, Content_Length=str(len(body) + 9)),
        "length too short": lambda: request(path, body, Content_Length=str(len(body) - 9)),
        "length negative": lambda: request(path, body, Content_Length="-1"),
        "length no number": lambda: request(
            path, body, Content_Length=rng.choice(["x", "1e3", "0x10", "\uff19", "+5"])
        ),
        "length huge": lambda: request(path, body, Content_Length="9" * 40),
        "two lengths": lambda: request(path, body, Content_length="3"),
        "length and chunks": lambda: request(path, chunk(size, body) + b"0\r\n\r\n", Transfer_Encoding="chunked"),
        "chunks": lambda: chunked + chunk(size, body) + b"0\r\n\r\n",
        "chunks of one byte": lambda: chunked + b"".join(chunk(b"1", bytes([b])) for b in body) + b"0\r\n\r\n",
        "chunk size wrong": lambda: chunked + chunk(rng.choice([b"-5", b"zz", b"", b"1" * 99, b"0x5"]), body),
        "chunk cut": lambda: chunked + chunk(size, body)[: rng.randrange(1, len(body))],
        "trailers": lambda: chunked + chunk(size, body) + b"0\r\n" + b"X: y\r\n" * rng.choice([1, 5000]) + b"\r\n",
        "transfer coding": lambda: request(path, body, Transfer_Encoding=rng.choice(["gzip", "chunked, chunked", "x"])),
        "content coding": lambda: request(path, body, Content_Encoding="gzip"),
        "type": lambda: request(path, body, Content_Type=rng.choice(["", "text/plain", "a" * 9000, "json"])),
        "charset": lambda: request(path, body, Content_Type="application/json; charset=utf-16"),
        "no host": lambda: request(path, body, Host=""),
        "huge header": lambda: request(path, body, X="y" * rng.choice([5000, 70_000, 500_000])),
        "many headers": lambda: request(path, body, **{f"X{n}": "y" for n in range(rng.choice([50, 5000]))}),
        "NUL in a header": lambda: request(path, body, X="a\x00b"),
        "folded header": lambda: request(path, body, X="a\r\n b"),
        "no colon": lambda: request(path, body).replace(b"Host: x", b"Host"),
        "line feeds": lambda: request(path, body).replace(b"\r\n", b"\n"),
        "method": lambda: request(path, body, method=rng.choice(["GET", "PUT", "TRACE", "X" * 5000, "é", "post"])),
        "version": lambda: request(path, body, version=rng.choice(["0.9", "1.0", "2.0", "9.9", "x"])),
        "path": lambda: request(
            rng.choice(["*", "/%ff", "/" + "a" * 70_000, "/../v1", "http://y/v1", "/\x1b[2J"]), body
        ),
        "query": lambda: request(f"{path}?{'a=b&' * rng.choice([1, 9000])}", body),
        "continue": lambda: request(path, body, Expect=rng.choice(["100-continue", "x"])),
        "upgrade": lambda: request(path, body, Connection="Upgrade", Upgrade=rng.choice(["websocket", "h2c"])),
        "HTTP/2": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(50),
        "TLS": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
        "noise": lambda: rng.randbytes(rng.choice([1, 100, 100_000])),
        "two requests": lambda: request(path, body) * 2,
        "authorization": lambda: request(
            path, body, Authorization=rng.choice(["Bearer \xff", "x" * 9000, "Basic Og=="])
        ),
    }
    name = rng.choice(list(odd))
    waits = ("length too long", "length huge", "chunk", "noise", "TLS", "HTTP/2", "line feeds", "two", "no host")
    return f"{path} {name} ({length})", odd[name](), not name.startswith(waits)


def answer_of(port: int, raw: bytes, seconds: float) -> bytes | None:
    """The response to the bytes, up to the end of the first answer; None if nothing arrives in time."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        # The server may refuse before it has read everything; its answer can still be read.
        with contextlib.suppress(OSError):
            connection.sendall(raw)
        found, due = b"", time.monotonic() + seconds
        while not _is_complete(found):
            ready, _, _ = select.select([connection], [], [], max(0.0, due - time.monotonic()))
            if not ready:
                return found or None
            try:
                part = connection.recv(65536)
            except OSError:
                return found
            if not part:
                return found
            found += part
        return found


def _is_complete(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    if head.startswith(b"HTTP/1.1 100"):
        return _is_complete(body)
    length = re.search(rb"(?im)^content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def judged(answer: bytes | None, *, complete: bool) -> Faults:
    """The faults of an answer."""
    if answer is None:
        return [("hung", f"no answer in {SECONDS:g} s")] if complete else []
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    if not answer:
        return [("lost", "closed without an answer")] if complete else []
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if not (status == 200 or 400 <= status < 500):
        return [("other", f"status {status}: {body[:300]!r}")]
    if b"Traceback" in body or len(body) > 1 << 22:
        return [("other", f"status {status} with {len(body)} bytes: {body[:300]!r}")]
    if status == 200:
        return []
    try:
        reason = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        reason = body.decode("latin-1")
    return [] if reason.strip() and len(reason) < 5000 else [("other", f"{status} says nothing useful: {body[:300]!r}")]


class _Server:
    """`python -m memjax.serve` in its own process."""

    def __init__(self, folder: pathlib.Path) -> None:
        make_run(folder / "run")
        self.errors = folder / "errors"
        command = [sys.executable, "-m", "memjax.serve", str(folder / "run"), "--port", "0", "--slots", "4"]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        self.port = 0
        while not self.port and (line := self.process.stdout.readline()):
            if found := re.search(r"127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
        # The first request of each kind waits for compilation.
        for logprobs in (0, 5, 20):
            body = SOUND["/v1/completions"] | {"logprobs": logprobs}
            answer_of(self.port, request("/v1/completions", json.dumps(body).encode()), 120)
        self.first = self.normal()
        self.stalled: list[tuple[float, socket.socket]] = []

    def normal(self) -> Any:
        """The answer to a normal request."""
        body = json.dumps({"prompt": "ab", "max_tokens": 3, "temperature": 0, "ignore_eos": True}).encode()
        found = answer_of(self.port, request("/v1/completions", body), SECONDS)
        try:
            return json.loads((found or b"").partition(b"\r\n\r\n")[2])["choices"]
        except (ValueError, KeyError):
            return found

    def cpu_seconds(self) -> float:
        """CPU seconds used so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stall(self, raw: bytes, how: int) -> None:
        """Sends part of a request, then stalls, half-closes, resets or closes the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        with contextlib.suppress(OSError):
            connection.sendall(raw)
            if how == 0:
                self.stalled.append((time.monotonic(), connection))
                return
            if how == 1:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)
            if how == 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def memory(self) -> int:
        """Resident memory in bytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))) << 10

    def given_up(self) -> Faults:
        """Waits until the server has closed all stalled connections."""
        faults: Faults = []
        for since, connection in self.stalled:
            connection.settimeout(max(0.1, since + STALLED_SECONDS - time.monotonic()))
            try:
                while connection.recv(65536):
                    pass
            except TimeoutError:
                faults.append(("hung", f"a client that sends no more is there after {STALLED_SECONDS:g} s"))
            except OSError:
                pass
            connection.close()
        return faults

    def end(self) -> Faults:
        """Sends SIGTERM, and checks the exit code and standard error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return [("hung", "does not end after SIGTERM")]
        said = self.errors.read_text(encoding="utf-8", errors="replace")
        faults: Faults = [("tracebacks", said[-2000:])] if "Traceback" in said else []
        return [*faults, *([("other", f"exit code {self.process.returncode}")] if self.process.returncode else [])]


def http(seed: int, count: int, folder: pathlib.Path) -> Attempts:
    """Sends requests to one server, which must keep answering normal ones identically, bound its memory, and end."""
    rng, server = random.Random(f"http {seed}"), _Server(folder)
    begun = 0
    for number in range(count):
        how, raw, complete = hostile(rng)
        stall = rng.randrange(4) if rng.random() < 0.1 else None
        if stall is not None and not (stall == 0 and len(server.stalled) >= 20):
            part = raw[: rng.randrange(len(raw) + 1)]
            yield f"{how}: {len(part)} bytes, then {stall}", lambda p=part, s=stall: server.stall(p, s) or []
            continue
        if number == count // 5:
            begun = server.memory()

        def attempt(raw: bytes = raw, complete: bool = complete, check: bool = number % 20 == 0) -> Faults:
            before = server.cpu_seconds()
            answer = answer_of(server.port, raw, SECONDS if complete else 0.3)
            # It may be compiling a program that no earlier request needed, on a busy machine.
            if answer is None and complete and server.cpu_seconds() - before > SECONDS / 4:
                answer = answer_of(server.port, raw, 10 * SECONDS)
            faults = judged(answer, complete=complete)
            if check and (found := server.normal()) != server.first:
                faults.append(("wrong", f"a normal request is answered by {found!r:.300}, at first {server.first!r}"))
            return faults

        yield how, attempt

    def last() -> Faults:
        faults = server.given_up()
        if server.normal() != server.first:
            faults.append(("wrong", "the last normal request is answered otherwise"))
        if begun and (grown := server.memory() - begun) > MEMORY_BYTES:
            faults.append(("other", f"memory has grown by {grown >> 20} MB"))
        return [*faults, *server.end()]

    yield "the server's end", last
