"""Set-up of the whole suite: eight CPU devices, strict rank promotion, reproducible property tests, no network."""

import dataclasses
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Compilation takes most of the suite's time, so XLA's optimisations are disabled; processes that tests start inherit
# this. Must be set before JAX is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Workers, modules and processes share compiled programs, but different runs of the suite do not: the folder lives as
# long as the process that started the suite.
os.environ.setdefault("MEMJAX_COMPILE_CACHE", "off")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="memjax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA's thread pool: each device that waits for the others holds a thread, and some must be left over.
os.environ.setdefault("NPROC", "32")

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

# Annotated shapes and types are checked at every call, except in Triton kernels, whose source must not be rewritten.
_root = pathlib.Path(__file__).parents[1]
_modules = [path for path in (_root / "memjax").rglob("*.py") if path.name != "__init__.py"]
_sources = [path for path in _modules if "@triton.jit" not in path.read_text()]
jaxtyping.install_import_hook(
    [".".join(path.relative_to(_root).with_suffix("").parts) for path in _sources], "beartype.beartype"
)

# All of this must be set before the first backend starts. JAX_PLATFORMS=cuda,cpu also runs the tests marked `gpu`.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    # Without a GPU, Triton kernels run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# XLA's newer CPU code generator is twice as slow for a training step as the older one, which jax 0.11 has removed, so
# only the tests on Python 3.12 use it. Processes that tests start inherit this.
if jax.__version_info__ < (0, 11) and "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
jax.config.update("jax_num_cpu_devices", 8)
# Strict dtype promotion is not possible: optax multiplies floats by integer counts.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Background jobs of a script ignore SIGINT, and child processes inherit this; the tests of Ctrl-C need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compilation makes single examples slow, so a time limit per example would give spurious failures.
for _name, _examples in (("ci", 15), ("ci_again", 8), ("dev", 10), ("thorough", 1000)):
    _same = _name.startswith("ci")
    hypothesis.settings.register_profile(_name, max_examples=_examples, derandomize=_same, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _refuse_network(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise RuntimeError(f"a test tried to reach {host}: tests must run without a network")


sys.addaudithook(_refuse_network)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Drops compiled programs after each module: others do not use them, and a large heap slows garbage collection."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _log_as_commands_do() -> None:
    from memjax.io.console import log_to_console

    log_to_console()


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Disables the suite's checks of annotations, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def heeding_hangups() -> Iterator[None]:
    """Lets SIGHUP end programs even if the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """Eight host devices as 2 x 4, so that an error on either axis shows."""
    assert jax.device_count("cpu") == 8, "conftest.py must set the device count before JAX starts"
    automatic = jax.sharding.AxisType.Auto
    return jax.make_mesh((2, 4), ("data", "memory"), axis_types=(automatic, automatic), devices=jax.devices("cpu"))


TINY = """
--model.dim 16 --model.num_layers 2 --model.num_heads 2 --model.ffn_dim 24 --model.vocab_size 259
--model.memory.layers 0,1 --model.memory.num_keys 8 --model.memory.num_heads 2 --model.memory.top_k 3
--model.memory.key_dim 8 --model.memory.value_dim 256
--data.batch_size 16 --data.sequence_length 8
--optim.warmup_steps 0 --optim.table.warmup_steps 0 --optim.schedule constant --optim.table.schedule constant
"""


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """tiny_config(*settings): a config with two memory layers, overridden by settings as on a command line."""
    from memjax.config.load import load
    from memjax.config.run import RunConfig

    return lambda *settings: load(RunConfig, None, " ".join([TINY, *settings]).split())


@dataclasses.dataclass
class ByHand:
    """Log-probabilities from whole forward passes, without cache, batching or left padding."""

    logits: Callable[[Sequence[int]], np.ndarray]

    def score(self, context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[float, bool]:
        """Scores each token given as many preceding tokens as its window holds."""
        ids = [*context, *continuation]
        nats, is_greedy = 0.0, True
        for start in range(len(context), len(ids), max_length):
            stop = min(start + max_length, len(ids))
            window = ids[max(0, stop - 1 - max_length) : stop]
            logits = self.logits(window[:-1]).astype(np.float64)
            for place in range(start - stop, 0):
                row = logits[place]
                nats += row[window[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
                is_greedy &= row.argmax() == window[place]
        return nats, bool(is_greedy)

    def write(self, prompt: Sequence[int], count: int) -> list[int]:
        """Decodes greedily until the end of text."""
        ids = list(prompt)
        for _ in range(count):
            token = int(self.logits(ids)[-1].argmax())
            if token == 2:  # the end of text
                break
            ids.append(token)
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def drawn_model() -> Any:
    """A small decoder with a memory layer, for the byte tokenizer; shared by all tests, so none may modify it."""
    from drawn import drawn
    from memjax.config.memory import MemoryConfig
    from memjax.config.model import ModelConfig

    config = ModelConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        vocab_size=259,
        dtype="float32",
        memory=MemoryConfig(layers=(0,), num_keys=8, num_heads=2, top_k=4, key_dim=8),
    )
    return drawn(config, seed=1)


@pytest.fixture(scope="session")
def by_hand(drawn_model) -> ByHand:
    """Reference scores and texts of `drawn_model`."""
    from flax import nnx

    forward = nnx.jit(lambda model, tokens: model(tokens))

    def logits(tokens: Sequence[int]) -> np.ndarray:
        # Attention is causal, so padding on the right changes nothing, and a single program suffices.
        padded = np.full((1, 64), 7, np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(drawn_model, jnp.asarray(padded)))[0, : len(tokens)]

    return ByHand(logits)
