"""Over real HTTP: answers equal those of the model alone, whatever other clients request, ignore or hang up on."""

import asyncio
import contextlib
import functools
import gzip
import http.client
import json
import pathlib
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from drawn import drawn
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.inference.bodies import unique_names
from memjax.inference.scheduler import Scheduler
from memjax.inference.scoring import PromptScorer
from memjax.inference.server import HttpServer
from memjax.inference.service import Limits, Service
from memjax.inference.serving_engine import ServingEngine
from memjax.inference.text import continue_texts
from memjax.models.decoder import Decoder

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments/trust"))

import clients

MAX_LENGTH = 64
SLOTS = 4
KEY = "a key"
JSON = {"Content-Type": "application/json"}


@functools.cache
def tiny() -> Decoder:
    memory = MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8)
    config = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32, vocab_size=259, dtype="float32", memory=memory)
    return drawn(config)


class Running:
    """A server in this process."""

    def __init__(
        self, *, queue: int = 64, api_key: str | None = None, slow: float = 0.0, connections: int = 1024, **limits: Any
    ):
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.service = Service(
            ByteTokenizer(),
            vocab_size=259,
            model_name="tiny",
            limits=Limits(**{"max_length": MAX_LENGTH, **limits}),
            api_key=api_key,
        )
        engine = ServingEngine(tiny(), num_slots=SLOTS, max_length=MAX_LENGTH)
        self.step = engine.step
        if slow:
            # Generate slowly, one token at a time.
            engine.step = lambda max_tokens: (time.sleep(slow), self.step(min(max_tokens, 1)))[1]
        self.engine = engine
        score = PromptScorer(tiny())
        self.scheduler = Scheduler(engine, self.service.deliver, max_waiting=queue, score=score)
        self.service.attach(self.scheduler)
        self.scheduler.start()
        self.server = HttpServer(self.service, listening, drain_seconds=20.0, max_connections=connections)
        self.loop: asyncio.AbstractEventLoop | None = None
        ready = threading.Event()

        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.run(ready=ready.set)

        self.thread = threading.Thread(target=lambda: asyncio.run(main()))
        self.thread.start()
        assert ready.wait(30)

    def drain(self) -> None:
        assert self.loop is not None
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.server.drain)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] = JSON
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        with contextlib.closing(connection):
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def ask(self, **body: Any) -> dict[str, Any]:
        status, _, answer = self.send("POST", "/v1/completions", body)
        assert status == 200, answer
        return json.loads(answer)

    def refused(self, body: Any, path: str = "/v1/completions", headers: dict[str, str] = JSON) -> tuple[int, dict]:
        status, _, answer = self.send("POST", path, body, headers)
        assert 400 <= status < 500, (status, answer)
        return status, json.loads(answer)["error"]

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        status, headers, answer = self.send("POST", "/v1/completions", {"stream": True, **body})
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer
        events = answer.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        due = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < due, "the condition was not met in time"
            time.sleep(0.01)

    def is_idle(self) -> bool:
        return not (self.service.num_active or self.scheduler.num_running or self.scheduler.num_waiting)


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Running]:
    server = Running(**settings)
    try:
        yield server
    finally:
        server.drain()
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert not server.scheduler.is_alive


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found
        found.wait_until(found.is_idle)


def alone(prompt: str, *, max_tokens: int = 16, stop: tuple[str, ...] = (), **sampling: Any) -> Any:
    (found,) = continue_texts(
        tiny(), ByteTokenizer(), [prompt], max_tokens=max_tokens, stop=stop, sampling=SamplingConfig(**sampling)
    )
    return found


DRAWN = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2, "seed": 5}
MIN_P = {"temperature": 1.3, "min_p": 0.2, "seed": 7}
PENALISED = {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": -0.5}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.3, "seed": 7}, MIN_P, DRAWN, PENALISED])
def test_an_answer_is_what_the_model_writes_alone(server, sampling):
    answer = server.ask(prompt="What is", max_tokens=12, **sampling)
    expected = alone("What is", max_tokens=12, **sampling)
    finish = "length" if expected.finish == "length" else "stop"
    assert answer["choices"] == [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": finish}]
    assert answer["usage"]["prompt_tokens"] == len("What is") + 1
    assert answer["usage"]["completion_tokens"] == expected.tokens
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")


def test_defaults_are_those_of_the_interface(server):
    answer = server.ask(prompt="What is", seed=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer == server.ask(prompt="What is", seed=3, ignore_eos=True, temperature=1, top_p=1, n=1, stop=None) | {
        "id": answer["id"],
        "created": answer["created"],
    }
    unseeded = {server.ask(prompt="What is", ignore_eos=True)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) > 1


def test_the_largest_numbers_are_served(server):
    greedy = server.ask(prompt="ab", max_tokens=4, temperature=0)["choices"]
    for seed in (-(1 << 63), (1 << 63) - 1):
        assert server.ask(prompt="ab", max_tokens=4, temperature=2, top_k=1, seed=seed)["choices"] == greedy
        drawn = [server.ask(prompt="ab", max_tokens=4, seed=seed, top_k=top_k)["choices"] for top_k in (10**40, None)]
        assert drawn[0] == drawn[1]


def test_several_prompts_and_choices_are_each_what_they_are_alone(server):
    prompts = ["What is", "x", "A longer one"]
    answer = server.ask(prompt=prompts, n=2, max_tokens=8, seed=4)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert texts[::2] == [alone(prompt, max_tokens=8, temperature=1.0, seed=4).text for prompt in prompts]
    assert texts[2:4] == [choice["text"] for choice in server.ask(prompt="x", n=2, max_tokens=8, seed=4)["choices"]]
    assert len(set(texts)) == 6


def test_token_ids_are_valid_prompts_and_get_the_begin_token_once(server):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("What is")
    expected = alone("What is", max_tokens=8).text
    greedy = {"max_tokens": 8, "temperature": 0}
    for prompt in (ids, [ids], [tokenizer.bos_id, *ids]):
        answer = server.ask(prompt=prompt, **greedy)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == len(ids) + 1
    bare = server.ask(prompt=ids, add_special_tokens=False, **greedy)
    assert bare["usage"]["prompt_tokens"] == len(ids)
    assert bare["choices"][0]["text"] != expected


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def test_streams_add_up_to_the_answer_and_end_with_the_usage(server):
    asked = {"prompt": ["What is", "x"], "max_tokens": 20, "seed": 2, "n": 2, "echo": True}
    answer = server.ask(**asked)
    events = server.stream(**asked, stream_options={"include_usage": True})
    for index in range(4):
        assert joined(events, index) == answer["choices"][index]["text"]
        ends = [
            c["finish_reason"]
            for event in events
            for c in event["choices"]
            if c["index"] == index and c["finish_reason"]
        ]
        assert ends == [answer["choices"][index]["finish_reason"]]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == answer["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in server.stream(prompt="x", max_tokens=2)[0]
    # OpenAI's and vLLM's other options, which clients may switch off by name.
    off = {"include_obfuscation": False, "continuous_usage_stats": None}
    assert "usage" not in server.stream(prompt="x", max_tokens=2, stream_options=off)[0]
    on = {**off, "include_usage": True}
    assert server.stream(prompt="x", max_tokens=2, stream_options=on)[-1]["usage"]["prompt_tokens"] == 2


def text_with_long_letters() -> tuple[int, str]:
    """A seed whose text has multi-byte characters, and that text."""
    for seed in range(200):
        text = alone("é", max_tokens=40, temperature=1.0, seed=seed).text
        if any(ord(letter) > 127 and letter != "\ufffd" for letter in text):
            return seed, text
    raise AssertionError("no such text")


def test_letters_of_several_bytes_are_not_cut(server):
    seed, text = text_with_long_letters()
    events = server.stream(prompt="é", max_tokens=40, seed=seed)
    assert joined(events) == text


def test_stop_strings_end_texts_across_pieces(server):
    text = alone("What is", max_tokens=40, temperature=1.0, seed=1).text
    stops = [text[start : start + length] for start, length in ((3, 1), (5, 3), (9, 7))]
    for stop in [(stops[0],), (stops[1],), (stops[2],), (*stops[1:], "never there")]:
        expected = alone("What is", max_tokens=40, stop=stop, temperature=1.0, seed=1)
        assert expected.finish == "stop"
        asked = {"prompt": "What is", "max_tokens": 40, "seed": 1, "stop": list(stop) if len(stop) > 1 else stop[0]}
        answer = server.ask(**asked)
        assert answer["choices"][0]["text"] == expected.text
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == expected.tokens
        assert joined(server.stream(**asked)) == expected.text
    # A special token may be a stop string, too.
    assert server.ask(prompt="What is", max_tokens=40, seed=1, stop="<pad>")["usage"]["completion_tokens"] <= 40
    server.wait_until(server.is_idle)


forward = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


def log_probabilities(ids: list[int]) -> np.ndarray:
    """Computes the whole vocabulary's log-probabilities at every position by the plain forward pass."""
    padded = np.zeros((1, MAX_LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(tiny(), jnp.asarray(padded)))[0, : len(ids)]


def test_logprobs_are_those_of_the_forward_pass(server):
    tokenizer = ByteTokenizer()
    prompt = tokenizer.encode("What is")
    answer = server.ask(prompt="What is", max_tokens=10, temperature=0, logprobs=3, echo=True, ignore_eos=True)
    choice = answer["choices"][0]
    likely = choice["logprobs"]
    # One entry for each token that the client knows of, so without the begin token that the server adds.
    assert len(likely["tokens"]) == len(likely["token_logprobs"]) == len(prompt) + 10
    assert likely["tokens"][:7] == list("What is")
    alone_ids = [tokenizer.bos_id, *prompt]
    for place in range(len(prompt) + 10):
        row = log_probabilities(alone_ids)[place]
        token = prompt[place] if place < len(prompt) else int(np.argmax(row))
        assert likely["token_logprobs"][place] == pytest.approx(float(row[token]), abs=1e-4)
        best = sorted(row, reverse=True)[:3]
        top = likely["top_logprobs"][place]
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx([float(one) for one in best], abs=1e-4)
        assert likely["token_logprobs"][place] in top.values()
        assert len(top) <= 4
        if place >= len(prompt):
            alone_ids.append(token)
    offsets = likely["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[:7] == list(range(7))
    for start, token in zip(offsets, likely["tokens"], strict=True):
        if not token.startswith(("bytes:", "<", "token:")):
            assert choice["text"][start : start + len(token)] == token


def test_a_bias_changes_the_text_and_not_the_log_probabilities(server):
    tokenizer, banned = ByteTokenizer(), {}
    asked = {"prompt": "What is", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    for bias in ({}, {5: 1.5, 9: -0.25}, banned):
        ids, values = [tokenizer.bos_id, *tokenizer.encode("What is")], []
        for _ in range(6):
            row = log_probabilities(ids)[len(ids) - 1]
            biased = row.astype(np.float64)
            biased[list(bias)] += list(bias.values())
            ids.append(int(np.argmax(biased)))
            values.append(row[ids[-1]])
        choice = server.ask(**asked, logit_bias={str(token): value for token, value in bias.items()})["choices"][0]
        assert choice["text"] == tokenizer.decode(ids[-6:])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(values, abs=1e-4)
        banned.update(dict.fromkeys(ids[-6:], -100))


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(server):
    asked = {"prompt": "What is", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    tokenizer, ids = ByteTokenizer(), [1, *ByteTokenizer().encode("What is")]
    for _ in range(12):
        ids.append(int(np.argmax(log_probabilities(ids)[len(ids) - 1])))
    made = ids[-12:]
    stop = next(token for place, token in enumerate(made) if place > 2 and token not in made[:place])
    length = made.index(stop)
    others = [token for token in range(259) if token not in made]
    choice = server.ask(**asked, stop_token_ids=[*others, stop], logprobs=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (tokenizer.decode(made[:length]), "stop")
    # As for the end token, the last entry is that of the token that ended the text.
    assert len(choice["logprobs"]["tokens"]) == length + 1
    answer = server.ask(**asked, stop_token_ids=others)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12


def test_a_prompt_is_scored_alone_too_and_its_first_token_follows_nothing(server):
    ids = [1, *ByteTokenizer().encode("What is")]
    answer = server.ask(prompt=ids, max_tokens=0, logprobs=0, echo=True)
    choice = answer["choices"][0]
    assert choice["text"] == "What is"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    rows = log_probabilities(ids)
    expected = [float(rows[place, token]) for place, token in enumerate(ids[1:])]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert [list(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [[letter] for letter in "What is"]
    assert server.ask(prompt="What is", max_tokens=0, echo=True)["choices"][0]["text"] == "What is"


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_copies_of_a_prompt_report_its_log_probabilities_and_score_it_once(server, max_tokens, monkeypatch):
    scored, score = [], server.scheduler._score
    monkeypatch.setattr(server.scheduler, "_score", lambda ids, num_top: (scored.append(ids), score(ids, num_top))[1])
    asked = {"prompt": ["What is", "Who"], "n": SLOTS + 1, "max_tokens": max_tokens, "seed": 2, "ignore_eos": True}
    choices = server.ask(**asked, logprobs=1, echo=True)["choices"]
    assert sorted(map(len, scored)) == [4, 8]
    assert len(choices) == 2 * (SLOTS + 1)
    for place, choice in enumerate(choices):
        prompt = asked["prompt"][place // (SLOTS + 1)]
        alone = server.ask(prompt=prompt, max_tokens=0, logprobs=1, echo=True)["choices"][0]["logprobs"]
        found = {name: values[: len(prompt)] for name, values in choice["logprobs"].items()}
        assert found == alone
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + max_tokens
        assert choice["text"].startswith(prompt)


def test_the_token_that_ends_a_text_has_a_log_probability_too(server):
    tokenizer = ByteTokenizer()
    prompt = [tokenizer.bos_id, *tokenizer.encode("What is")]
    row = log_probabilities(prompt)[-1]

    @jax.jit
    @jax.vmap
    def first_token(seed: jax.Array) -> jax.Array:
        """The first token drawn with a seed, by the definition of a draw."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
        return jax.random.categorical(key, jnp.asarray(row))

    seed = int(np.argmax(first_token(jnp.arange(30_000)) == tokenizer.eos_id))
    assert seed > 0
    answer = server.ask(prompt="What is", max_tokens=1, seed=seed, logprobs=1, echo=True)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("What is", "stop")
    # lm-eval drops the last entry, assuming that it belongs to the one token that it has to request.
    assert choice["logprobs"]["tokens"] == [*"What is", "<eos>"]
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(float(row[tokenizer.eos_id]), abs=1e-4)
    assert max(choice["logprobs"]["top_logprobs"][-1].values()) == pytest.approx(float(max(row)), abs=1e-4)
    assert joined(server.stream(prompt="What is", max_tokens=1, seed=seed, logprobs=1, echo=True)) == "What is"


def test_streamed_logprobs_are_those_of_the_answer_and_end_with_the_text(server):
    text = alone("What is", max_tokens=30, temperature=1.0, seed=1).text
    for stop in (None, text[8:11]):
        asked = {"prompt": "What is", "max_tokens": 30, "seed": 1, "logprobs": 2, "stop": stop, "echo": True}
        whole = server.ask(**asked)["choices"][0]
        parts = [choice["logprobs"] for event in server.stream(**asked) for choice in event["choices"]]
        for name, values in whole["logprobs"].items():
            assert [value for part in parts for value in part[name]] == values
        assert all(start < len(whole["text"]) for start in whole["logprobs"]["text_offset"])


def test_hanging_up_frees_the_slot_and_the_place_in_the_queue():
    with running(slow=0.05) as server:
        asked = json.dumps({"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
        connections = []
        for _ in range(SLOTS + 3):
            connection = server.connect()
            connection.request("POST", "/v1/completions", asked, JSON)
            connections.append(connection)
        server.wait_until(lambda: server.scheduler.num_running == SLOTS and server.scheduler.num_waiting == 3)
        # The last two wait in the queue.
        for connection in connections[-2:]:
            connection.close()
        server.wait_until(lambda: server.scheduler.num_waiting == 1)
        for connection in connections[:SLOTS]:
            connection.close()
        server.wait_until(lambda: server.scheduler.num_running == 1 and server.scheduler.num_waiting == 0)
        response = connections[SLOTS].getresponse()
        assert response.read().decode().endswith("data: [DONE]\n\n")
        connections[SLOTS].close()
        server.wait_until(server.is_idle)
        server.wait_until(lambda: server.service.metrics.codes == {200: 1, 499: SLOTS + 2})
        assert server.engine.free_slots == list(range(SLOTS))


@pytest.mark.slow
def test_thirty_clients_get_the_same_as_alone_despite_hang_ups(server):
    rng = random.Random(0)
    asked = []
    for number in range(30):
        body = {"prompt": "".join(rng.choices("abc é", k=rng.randrange(0, 20))), "max_tokens": rng.randrange(1, 30)}
        body |= rng.choice([{"temperature": 0.0}, {"temperature": 1.0, "seed": number}, DRAWN])
        asked.append(body)
    problems: list[str] = []

    def client(number: int) -> None:
        body, hangs_up = asked[number], number % 3 == 0
        try:
            if hangs_up:
                connection = server.connect()
                raw = json.dumps({**body, "max_tokens": 40, "ignore_eos": True, "stream": number % 2 == 0}).encode()
                connection.request("POST", "/v1/completions", raw, JSON)
                time.sleep(rng.random() / 10)
                connection.close()
            elif number % 2:
                answers[number] = server.ask(**body)["choices"][0]["text"]
            else:
                answers[number] = joined(server.stream(**body))
        except Exception as error:
            problems.append(f"{number}: {error!r}")

    answers: dict[int, str] = {}
    threads = [threading.Thread(target=client, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert problems == []
    assert len(answers) == 20
    for number, text in answers.items():
        expected = alone(**asked[number]).text
        assert text == expected, asked[number]
    server.wait_until(server.is_idle)


def test_a_large_request_does_not_hold_up_a_small_one():
    with running(slow=0.03) as server:
        ended: list[str] = []

        def client(name: str, **body: Any) -> None:
            server.ask(prompt="x", max_tokens=6, ignore_eos=True, **body)
            ended.append(name)

        large = threading.Thread(target=client, args=("large",), kwargs={"n": 40})
        large.start()
        server.wait_until(lambda: server.scheduler.num_waiting > 20)
        client("small")
        large.join(60)
        assert ended == ["small", "large"]


def test_a_full_queue_is_refused_with_a_time_to_come_back():
    with running(slow=0.05, queue=2) as server:
        connections = [server.connect() for _ in range(SLOTS + 2)]
        asked = json.dumps({"prompt": "x", "max_tokens": 60, "ignore_eos": True}).encode()
        for number, connection in enumerate(connections):
            connection.request("POST", "/v1/completions", asked, JSON)
            begun = lambda number=number: server.scheduler.num_running + server.scheduler.num_waiting > number
            server.wait_until(begun)
            server.wait_until(lambda: server.scheduler.num_waiting <= 2)
            if number < SLOTS:
                server.wait_until(lambda: server.scheduler.num_waiting == 0)
        status, headers, answer = server.send("POST", "/v1/completions", {"prompt": "x"})
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        error = json.loads(answer)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "2 texts wait for a slot, and at most 2 may" in error["message"]
        for connection in connections:
            connection.close()
        server.wait_until(server.is_idle)
        # Neither refused nor abandoned requests count: they would make answers look fast, and Retry-After is
        # estimated from these.
        metrics = server.send("GET", "/metrics")[2].decode()
        assert f"memjax_prompt_tokens_total {2 * (SLOTS + 2)}\n" in metrics
        assert "memjax_request_seconds_count 0\n" in metrics
        server.ask(prompt="x", max_tokens=1)
        assert "memjax_request_seconds_count 1\n" in server.send("GET", "/metrics")[2].decode()
        # A request that can never fit is not told to retry.
        status, error = server.refused({"prompt": "x", "n": 3})
        assert (status, error["param"]) == (400, "n")


# The first server in a process configures logging, which closes the stream of absl's handler unless it is sys.stderr,
# so another one starts before capfd replaces that.
@pytest.mark.usefixtures("server")
def test_a_failing_engine_reports_to_its_clients_and_continues(capfd):
    with running() as server:
        expected = server.ask(prompt="x", max_tokens=4, temperature=0)["choices"]
        step = server.engine.step

        def fail(max_tokens: int) -> Any:
            server.engine.step = step
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        server.engine.step = fail
        status, _, answer = server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 4})
        assert status == 500
        assert json.loads(answer)["error"]["message"] == "the device is out of memory; try again"
        assert server.ask(prompt="x", max_tokens=4, temperature=0)["choices"] == expected
        assert "memjax_engine_failures 1\n" in server.send("GET", "/metrics")[2].decode()
    assert "RESOURCE_EXHAUSTED" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt is missing; it must be a string"),
        ({"prompt": 5}, "prompt", "prompt=5 must be a string, a list of strings"),
        ({"prompt": []}, "prompt", "prompt=[] must be"),
        ({"prompt": ["a", 5]}, "prompt", "must be"),
        ({"prompt": [5, "a"]}, "prompt", "must be"),
        ({"prompt": [[5], ["a"]]}, "prompt", 'prompt 1 holds "a" among its token ids'),
        ({"prompt": [1, 259]}, "prompt", "prompt holds the token id 259; the model knows 0..258"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [True]}, "prompt", "prompt=[true] must be"),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({"prompt": [], "add_special_tokens": False}, "prompt", "must be"),
        ({"prompt": "", "add_special_tokens": False}, "prompt", "must hold a token where add_special_tokens is false"),
        ({"prompt": "x", "max_tokens": 63}, "max_tokens", "max_tokens=63 more do not fit into the 64"),
        ({"prompt": "x" * 64}, "prompt", "the prompt has 65 tokens, and max_tokens=1 more do not fit"),
        ({"prompt": ["x", "x" * 64]}, "prompt", "prompt 1 has 65 tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "above 0 unless echo is true"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens=-1 must be a whole number"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens", "max_tokens=2.5 must be a whole number"),
        ({"prompt": "x", "temperature": 2.5}, "temperature", "temperature=2.5 must be a number in 0..2"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", 'temperature="hot" must be'),
        ({"prompt": "x", "top_p": 0}, "top_p", "top_p=0 must be a number above 0 and at most 1"),
        ({"prompt": "x", "top_k": -2}, "top_k", "top_k=-2 must be"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0 must be"),
        ({"prompt": "x", "seed": 1 << 64}, "seed", "must be a whole number of 64 bits"),
        ({"prompt": "x", "n": 0}, "n", "n=0 must be a whole number above 0"),
        ({"prompt": "x", "n": 1000}, "n", "more than the 64 texts of one request"),
        ({"prompt": "x", "stop": ""}, "stop", 'stop="" must be'),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16 strings"),
        ({"prompt": "x", "stop": ["a" * 257]}, "stop", "each of 1 to 256 characters"),
        ({"prompt": "x", "stop": [5]}, "stop", "stop=[5] must be"),
        ({"prompt": "x", "stop": ["\udc00"]}, "stop", "half of a surrogate pair"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "logprobs=21 must be a whole number in 0..20"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "logprobs=true must be"),
        ({"prompt": "x", "echo": 1}, "echo", "echo=1 must be true or false"),
        ({"prompt": "x", "stream": "yes"}, "stream", "must be true or false"),
        ({"prompt": "x", "stream_options": {}}, "stream_options", "left out if stream is false"),
        ({"prompt": "x", "stream": True, "stream_options": {"a": 1}}, "stream_options", "must be an object such as"),
        (
            {"prompt": "x", "stream": True, "stream_options": {"include_usage": 2}},
            "stream_options",
            "must be an object",
        ),
        ({"prompt": "x", "stream": True, "stream_options": False}, "stream_options", "where nothing else is true"),
        ({"prompt": "x", "best_of": 2}, "best_of", "best_of=2 must be left out or n=1"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "only continues prompts"),
        (
            {"prompt": "x", "presence_penalty": 2.5},
            "presence_penalty",
            "presence_penalty=2.5 must be a number in -2..2",
        ),
        ({"prompt": "x", "frequency_penalty": True}, "frequency_penalty", "frequency_penalty=true must be a number"),
        ({"prompt": "x", "min_p": 1.5}, "min_p", "min_p=1.5 must be a number in 0..1"),
        ({"prompt": "x", "logit_bias": [5]}, "logit_bias", 'logit_bias=[5] must be an object such as {"5": -100}'),
        ({"prompt": "x", "logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias", "with at most 300 token ids"),
        ({"prompt": "x", "logit_bias": {"259": 1}}, "logit_bias", 'holds the token id "259"; they must be whole'),
        ({"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", 'token id "-1"'),
        ({"prompt": "x", "logit_bias": {"\u0663": 1}}, "logit_bias", 'token id "\\u0663"'),
        ({"prompt": "x", "logit_bias": {"5": 1, "05": 1}}, "logit_bias", 'token id "05"; they must be whole numbers'),
        ({"prompt": "x", "logit_bias": {"5": -100.5}}, "logit_bias", "holds -100.5 for token 5; it must be a number"),
        ({"prompt": "x", "logit_bias": {"5": True}}, "logit_bias", "holds true for token 5"),
        ({"prompt": "x", "stop_token_ids": 5}, "stop_token_ids", "stop_token_ids=5 must be a list of at most 512"),
        ({"prompt": "x", "stop_token_ids": [259]}, "stop_token_ids", "whole numbers in 0..258"),
        ({"prompt": "x", "stop_token_ids": [5] * 513}, "stop_token_ids", "a list with 513 entries must be"),
        ({"prompt": "x", "user": 5}, "user", "user=5 must be a string"),
        ({"prompt": "x", "max_token": 5}, "max_token", '"max_token" is not a field of this request; known: '),
        ({"prompt": "x", "a\x1b\ud800b": 5}, "a\x1b\ud800b", '"a\\u001b\\ud800b" is not a field'),
    ],
)
def test_what_is_wrong_is_named_with_its_rule(server, body, param, words):
    status, error = server.refused(body)
    assert status == 400
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].isprintable() or "\n" in error["message"]


def test_everything_that_is_wrong_is_listed_and_null_means_the_default(server):
    _, error = server.refused({"prompt": 5, "n": 0, "echo": 1})
    assert len(error["message"].splitlines()) == 3
    wrong = {f"field{number}": 1 for number in range(100)}
    _, error = server.refused({"prompt": "x", **wrong})
    assert error["message"].splitlines()[-1] == "and 92 more"
    nulls = dict.fromkeys(
        (
            "temperature",
            "n",
            "stop",
            "stop_token_ids",
            "min_p",
            "logit_bias",
            "suffix",
            "best_of",
            "user",
            "stream_options",
        )
    )
    answer = server.ask(prompt="x", max_tokens=2, ignore_eos=True, **nulls)  # drawn without a seed: may end at once
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[1]", "the body is a list, not a JSON object"),
        (b"null", "the body is null, not a JSON object"),
        (b'"\xff"', "the body is not UTF-8 (byte 1)"),
        (b'{"prompt": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature=Infinity must be"),
        (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "the body is not JSON"),
        (b'{"prompt": "x", "n": ' + b"1" * 4000 + b"}", "n=a number of more than 70 digits times 1 prompts is more"),
        (b'{"prompt": "a", "prompt": "b"}', '"prompt" appears twice'),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body is not JSON (it is nested too deeply)"),
    ],
)
def test_a_body_that_is_not_an_object_is_refused(server, raw, words):
    status, error = server.refused(raw)
    assert status == 400
    assert words in error["message"]


def test_duplicate_names_are_found_in_linear_time():
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return super().__eq__(other)

    names = [Name(number) for number in range(300)]
    with pytest.raises(ValueError, match='"299" appears twice'):
        unique_names([(name, None) for name in [*names, Name(299)]])
    assert Name.compared < 1000


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_whatever_clients_send_is_answered_or_refused_with_a_reason(server, count):
    """Sends odd values, damaged bytes, huge prompts, odd headers and broken chunks."""
    rng, statuses = random.Random(count), set()
    for _ in range(count):
        how, raw, complete = clients.hostile(rng)
        answer = clients.answer_of(server.port, raw, 60 if complete else 0.05)
        assert clients.judged(answer, complete=complete) == [], how
        statuses.add((answer or b"HTTP/1.1 0").split()[1])
    assert statuses >= {b"200", b"400"}
    server.wait_until(server.is_idle)
    assert server.ask(prompt="x", max_tokens=1, ignore_eos=True)["usage"]["completion_tokens"] == 1


def test_paths_methods_and_types_that_are_not_served(server):
    for path in ("/", "/v1/chat/completions", "/health/", "/v1/models/", "/v1/models/other", "/v1/%00\x7f"):
        status, _, answer = server.send("GET", path.replace("\x7f", "%7f"))
        assert status == 404, path
        assert json.loads(answer)["error"]["message"].isprintable()
    # Clients of a proxy send the absolute URL.
    for path in ("/health", "/v1/models", "/v1/models/tiny"):
        assert server.send("GET", f"http://example.org:80{path}")[::2] == server.send("GET", path)[::2]
    assert server.send("GET", "http://example.org")[0] == 404
    status, headers, _ = server.send("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert server.send("DELETE", "/health")[0] == 405
    assert server.send("HEAD", "/health")[::2] == (200, b"")
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        status, error = server.refused({"prompt": "x"}, headers={"Content-Type": kind})
        assert status == 415
        assert "Content-Type: application/json" in error["message"]
    body = gzip.compress(b'{"prompt": "x"}')
    for encoding in ("gzip", "br, gzip", ""):
        status, headers, answer = server.send("POST", "/tokenize", body, {**JSON, "Content-Encoding": encoding})
        assert (status, headers["accept-encoding"]) == (415, "identity")
        message = f'Content-Encoding="{encoding}" is not served; leave it out and send the body uncompressed'
        assert json.loads(answer)["error"]["message"] == message
    assert server.send("POST", "/tokenize", {"prompt": "x"}, {**JSON, "Content-Encoding": "Identity"})[0] == 200
    status, error = server.refused({"prompt": "x", "model": "gpt-2"})
    assert (status, error["code"]) == (404, "model_not_found")
    assert server.ask(prompt="x", model="tiny", max_tokens=1)["model"] == "tiny"


def test_models_health_and_tokenizer_are_described(server):
    (model,) = json.loads(server.send("GET", "/v1/models")[2])["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", MAX_LENGTH)
    assert json.loads(server.send("GET", "/v1/models/tiny")[2]) == model
    assert json.loads(server.send("GET", "/health")[2]) == {"status": "ok"}
    info = json.loads(server.send("GET", "/tokenizer_info")[2])
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    tokens = json.loads(server.send("POST", "/tokenize", {"prompt": "é<eos>"})[2])
    assert tokens["tokens"] == [1, 0xC3 + 3, 0xA9 + 3, 2]
    assert tokens["count"] == 4
    assert json.loads(server.send("POST", "/detokenize", {"tokens": tokens["tokens"]})[2])["prompt"] == "<bos>é<eos>"


def test_metrics_count_what_was_done():
    with running() as server:
        server.ask(prompt="abc", max_tokens=5, ignore_eos=True)
        server.refused({})
        kind, text = server.send("GET", "/metrics")[1:]
        text = text.decode()
        assert kind["content-type"].startswith("text/plain; version=0.0.4")
        for line in (
            'memjax_requests_total{code="200"} 1',
            'memjax_requests_total{code="400"} 1',
            "memjax_prompt_tokens_total 4",
            "memjax_generated_tokens_total 5",
            "memjax_slots 4",
            "memjax_slots_in_use 0",
            "memjax_queue_length 0",
            "memjax_tokens_per_second 0.5",
            "memjax_time_to_first_token_seconds_count 1",
            'memjax_time_to_first_token_seconds_bucket{le="+Inf"} 1',
        ):
            assert f"{line}\n" in text, line
        sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]+"\})? [0-9.e+-]+')
        for line in text.splitlines():
            assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line), line


def test_tokens_that_were_read_for_another_prompt_are_counted():
    with running() as server:
        prompt = "A prompt that is longer than the smallest"
        details = [
            server.ask(prompt=[prompt, f"{prompt} one"][: number + 1], n=2, max_tokens=2, ignore_eos=True)["usage"]
            for number in range(2)
        ]
        # The last token of the prompt is always read; n choices count once.
        size = len(prompt) + 1
        assert details[0]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert details[1]["prompt_tokens_details"] == {"cached_tokens": size - 1 + size}
        metrics = server.send("GET", "/metrics")[2].decode()
        assert f"memjax_reused_prompt_tokens_total {2 * (size - 1 + size)}\n" in metrics


def test_a_key_is_required_everywhere_but_at_health():
    with running(api_key=KEY) as server:
        for headers in (JSON, {**JSON, "Authorization": "Bearer wrong"}, {**JSON, "Authorization": KEY}):
            for method, path in (
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/x"),
            ):
                status, found, answer = server.send(method, path, {"prompt": "x"}, headers)
                assert (status, found["www-authenticate"]) == (401, "Bearer")
                assert json.loads(answer)["error"]["code"] == "invalid_api_key"
                assert KEY.encode() not in answer
        assert server.send("GET", "/health", headers={})[0] == 200
        right = {**JSON, "Authorization": f"Bearer {KEY}"}
        assert server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, right)[0] == 200


def raw_answer(server: Running, sent: bytes) -> bytes:
    """Sends raw bytes, and reads until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                found += part
        return found


def test_slow_and_oversized_requests_are_cut_off():
    with running(body_seconds=0.5, max_body_bytes=10_000) as server:
        status, error = server.refused({"prompt": "x" * 10_000})
        assert status == 413
        assert "more than the 10,000 bytes" in error["message"]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        # A body far too long to be read to its end.
        endless = head + b"Content-Length: 100000000\r\n\r\n" + b" " * 200_000
        assert raw_answer(server, endless).startswith(b"HTTP/1.1 413") or not server.service.num_active
        assert raw_answer(server, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
        assert raw_answer(server, head) == b""
        assert raw_answer(server, b"") == b""
        huge = head + b"X-Huge: " + b"a" * 200_000
        assert raw_answer(server, huge).startswith(b"HTTP/1.1 400") or not server.service.num_active
        assert raw_answer(server, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert server.ask(prompt="x", max_tokens=1, ignore_eos=True)["usage"]["completion_tokens"] == 1


def test_clients_beyond_the_limit_get_an_error_except_at_health():
    with running(connections=3) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        connection = server.connect()
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"status":"ok"}')
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            assert (response.status, response.getheader("Retry-After")) == (503, "5")
            assert json.loads(response.read())["error"]["message"].startswith("too many clients are connected")
            assert response.getheader("Connection") == "close"
        idle.pop().close()
        server.wait_until(lambda: server.send("GET", "/v1/models")[0] == 200)
        for client in idle:
            client.close()


def test_draining_finishes_running_requests_and_accepts_no_new_ones():
    with running(slow=0.02) as server:
        connection = server.connect()
        asked = {"prompt": "x", "max_tokens": 40, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(asked).encode(), JSON)
        server.wait_until(lambda: server.scheduler.num_running == 1)
        server.drain()
        server.wait_until(lambda: server.service.is_draining)
        status, headers, _ = server.send("POST", "/v1/completions", {"prompt": "x"})
        assert (status, headers["retry-after"]) == (503, "5")
        assert server.send("GET", "/health")[0] == 503
        answer = json.loads(connection.getresponse().read())
        assert answer["usage"]["completion_tokens"] == 40
        connection.close()
        server.thread.join(30)
        with pytest.raises(OSError, match="refused"):
            server.send("GET", "/health")


def test_requests_that_take_too_long_to_drain_get_an_error():
    with running(slow=0.2) as server:
        server.server._drain_seconds = 0.3
        connections = [server.connect() for _ in range(2)]
        for connection, stream in zip(connections, (True, False), strict=True):
            asked = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": stream}
            connection.request("POST", "/v1/completions", json.dumps(asked).encode(), JSON)
        server.wait_until(lambda: server.scheduler.num_running == 2)
        streamed = connections[0].getresponse()
        server.drain()
        events = streamed.read().decode().split("\n\n")
        assert "shutting down" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
        response = connections[1].getresponse()
        assert response.status == 503
        assert "shutting down" in json.loads(response.read())["error"]["message"]
        for connection in connections:
            connection.close()
