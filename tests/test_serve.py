"""The serve command: what it refuses at the start, what it prints, and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from drawn import drawn
from memjax import serve
from memjax.checkpoint import Checkpoints
from memjax.config.data import DataConfig
from memjax.config.memory import MemoryConfig
from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.models.parts import split_decoder
from memjax.runs.layout import meta_document, params_to_tree


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    memory = MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8)
    model = ModelConfig(dim=16, num_layers=1, num_heads=2, ffn_dim=32, vocab_size=259, memory=memory)
    _, params, tables = split_decoder(drawn(model))
    config = RunConfig(model=model, data=DataConfig(sequence_length=2048))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        meta = meta_document(config, ByteTokenizer(), step=7)
        checkpoints.save(7, {"params": params_to_tree(params), "tables": tables}, {"meta": meta})
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--port", "65536"], "port=65536 must be in 0..65535"),
        (["--step", "none", "--slots", "0"], "slots=0 must be positive"),
        (["--step", "none", "--slots", "0"], "step=none must be latest, best or the number of a checkpoint"),
        (["--max_length", "1"], "max_length=1 must be at least 2"),
        (["--drain_seconds", "-1"], "drain_seconds=-1.0 must be in 0..1e6"),
        (["--host", ""], "host='' must not be empty"),
        (["--prot", "80"], "did you mean 'port'"),
    ],
)
def test_impossible_settings_are_refused(settings, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["runs/none", *settings])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_an_address_in_use_or_of_another_machine_is_refused_before_the_model_is_read(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert serve.main(["runs/none", "--port", port]) == 2
    assert f"host=127.0.0.1 and port={port} cannot be used (Address already in use)" in capsys.readouterr().err
    assert serve.main(["runs/none", "--host", "203.0.113.7", "--port", "0"]) == 2
    assert "host=203.0.113.7 and port=0 cannot be used" in capsys.readouterr().err
    assert serve.main(["runs/none", "--host", "a b", "--port", "0"]) == 2
    assert "host=a b is not an address" in capsys.readouterr().err


def test_a_missing_run_is_refused(tmp_path, capsys):
    assert serve.main([str(tmp_path / "none"), "--port", "0"]) == 4
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "a key ", "a\nkey"])
def test_a_key_that_nobody_can_send_is_refused(key, monkeypatch, capsys):
    monkeypatch.setenv("MEMJAX_API_KEY", key)
    assert serve.main(["runs/none", "--port", "0"]) == 2
    assert "MEMJAX_API_KEY must hold a key without spaces around it" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch, capsys):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert serve.main(["runs/none"]) == 2
    said = "needs starlette and uvicorn, which cannot be imported; pip install 'starlette>=1,<2' 'uvicorn>=0.50,<1'"
    assert said in capsys.readouterr().err


def test_an_open_server_without_a_key_warns(tmp_path, capsys):
    assert serve.main([str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 4
    assert "warning: anybody who reaches 0.0.0.0 can use the model; set MEMJAX_API_KEY" in capsys.readouterr().err
    assert serve.main([str(tmp_path), "--port", "0"]) == 4
    assert "warning" not in capsys.readouterr().err


@contextlib.contextmanager
def served(run: str, *settings: str, **environment: str):
    """A server process, its port and the lines it has printed."""
    command = [sys.executable, "-m", "memjax.serve", run, "--port", "0", "--slots", "2", *settings]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=variables | environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("  curl "):
                break
        match = re.search(r"at http://127\.0\.0\.1:(\d+)/v1\n", "".join(printed))
        assert match, printed
        yield process, int(match[1]), printed
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()


def post(port: int, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    status, answer = ask(port, "POST", "/v1/completions", body, **headers)
    return status, json.loads(answer)


def wait_for_work(port: int, **headers: str) -> None:
    due = time.monotonic() + 60
    while re.search(r"memjax_slots_in_use [12]\n", ask(port, "GET", "/metrics", **headers)[1]) is None:
        assert time.monotonic() < due
        time.sleep(0.01)


@pytest.mark.slow
def test_a_served_run_answers_and_drains_on_sigterm(run):
    # The longest text takes long enough to be unfinished when the signal arrives.
    with served(run, "--warm_up", "false", MEMJAX_API_KEY="sesame") as (process, port, printed):
        assert printed[0] == f"ready: tiny, step 7, at http://127.0.0.1:{port}/v1\n"
        assert printed[1].startswith(
            f"  curl http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json'"
        )
        assert '-H "Authorization: Bearer $MEMJAX_API_KEY"' in printed[1]
        assert post(port, {"prompt": "Once"})[0] == 401
        key = {"Authorization": "Bearer sesame"}
        status, answer = post(port, {"prompt": "Once", "max_tokens": 4}, **key)
        assert (status, answer["model"]) == (200, "tiny")
        asked = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
        answers = []
        client = threading.Thread(target=lambda: answers.append(post(port, asked, **key)))
        client.start()
        wait_for_work(port, **key)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        client.join(60)
        assert answers[0][1]["usage"]["completion_tokens"] == 2000
        rest = process.stdout.read() if process.stdout else ""
        assert rest.startswith("SIGTERM: waiting up to 30 s for running requests (1); a second signal ends at once\n")
        assert rest.endswith("ended\n")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(run):
    with served(run, "--max_length", "64") as (process, port, printed):
        assert printed[0] == "compiling ...\n"
        asked = {"prompt": "x", "n": 128, "max_tokens": 60, "ignore_eos": True}

        def client() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                post(port, asked)

        threads = [threading.Thread(target=client) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for_work(port)
        process.send_signal(signal.SIGINT)
        assert process.stdout
        assert "SIGINT: " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        for thread in threads:
            thread.join(30)
