"""Converted official checkpoints agree with the paper's formulas, computed in NumPy from the raw arrays."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import memjax
from memjax.checkpoint import CheckpointError
from memjax.errors import ConfigError
from memjax.interop.official.convert import from_official, load_decoder, load_layer, open_arrays

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures/official"
DIM, N, HEADS, KEY_DIM, TOP_K, TOKENS = 6, 5, 2, 4, 3, 7
VARIANTS = {
    "memory": {"value_dim": DIM},
    "memory+": {"value_dim": DIM, "swilu": True},
    "memory+, gated, narrow values": {"value_dim": 4, "swilu": True, "gated": True},
    "memory, gated, wide values": {"value_dim": 8, "gated": True},
}
QUERY = "query_proj.query_mlps.0"


def layer_arrays(value_dim: int = DIM, swilu: bool = False, gated: bool = False) -> dict[str, np.ndarray]:
    shapes = {
        "keys": (2 * HEADS * N, KEY_DIM // 2),
        "values.weight": (N * N, value_dim),
        f"{QUERY}.weight": (HEADS * KEY_DIM, DIM),
        f"{QUERY}.bias": (HEADS * KEY_DIM,),
    }
    if swilu:
        shapes |= {"swilu_projection.weight": (value_dim, DIM), "swilu_projection.bias": (value_dim,)}
    if swilu or value_dim != DIM:
        shapes |= {"value_proj.weight": (DIM, value_dim), "value_proj.bias": (DIM,)}
    if gated:
        shapes |= {"gating.weight": (1, DIM), "gating.bias": (1,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def memory_by_hand(arrays: dict[str, np.ndarray], x: np.ndarray, top_k: int) -> np.ndarray:
    """The paper's layer over [tokens, dim] in float64, from arrays named and laid out as in the official code."""
    a = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    n = int(len(a["values.weight"]) ** 0.5)
    half = a["keys"].shape[1]
    heads = len(a["keys"]) // (2 * n)
    keys = a["keys"].reshape(heads, 2, n, half)
    out = []
    for token in x:
        query = (a[f"{QUERY}.weight"] @ token + a[f"{QUERY}.bias"]).reshape(heads, 2, half)
        y = np.zeros(a["values.weight"].shape[1])
        for head in range(heads):
            first, second = (keys[head, part] @ query[head, part] for part in (0, 1))
            scores = (first[:, None] + second[None, :]).reshape(-1)
            best = np.argsort(scores)[::-1][:top_k]
            weights = np.exp(scores[best] - scores[best].max())
            y += (weights / weights.sum()) @ a["values.weight"][best]
        if "swilu_projection.weight" in a:
            gate = a["swilu_projection.weight"] @ token + a["swilu_projection.bias"]
            y = y * gate * sigmoid(gate)
        if "value_proj.weight" in a:
            y = a["value_proj.weight"] @ y + a["value_proj.bias"]
        if "gating.weight" in a:
            y = y * sigmoid(a["gating.weight"] @ token + a["gating.bias"])
        out.append(y)
    return np.stack(out)


def slopes(function, array: np.ndarray) -> np.ndarray:
    """Central differences of a scalar function with respect to an array that it reads."""
    found, step = np.zeros(array.shape), 1e-6
    for place in np.ndindex(array.shape):
        kept = array[place]
        values = []
        for sign in (1, -1):
            array[place] = kept + sign * step
            values.append(function())
        array[place], found[place] = kept, (values[0] - values[1]) / (2 * step)
    return found


def in_official_order(gradient: nnx.State) -> dict[str, np.ndarray]:
    """A layer's gradients under the official names, arranged by hand."""
    g = jax.tree.map(np.asarray, nnx.to_pure_dict(gradient))
    keys = g["keys"]
    found = {"keys": keys["keys"].reshape(-1, KEY_DIM // 2), f"{QUERY}.weight": keys["query_kernel"].T}
    found[f"{QUERY}.bias"] = keys["query_bias"]
    for ours, theirs in (("gate_proj", "swilu_projection"), ("value_proj", "value_proj"), ("output_gate", "gating")):
        if ours in g:
            found |= {f"{theirs}.weight": g[ours]["kernel"].T, f"{theirs}.bias": g[ours]["bias"]}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_gives_the_outputs_and_gradients_of_the_paper(variant):
    arrays = layer_arrays(**VARIANTS[variant])
    layer, table = load_layer(arrays, top_k=TOP_K)
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(size=(2, TOKENS, DIM))
    graphdef, state = nnx.split((layer, table))

    @jax.jit
    def run(state, x):
        def loss(state, x):
            layer, table = nnx.merge(graphdef, state)
            out = layer(x, table)
            return jnp.sum(out * cotangent.astype(np.float32)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (gradient, d_x), out = run(state, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, memory_by_hand(arrays, x, TOP_K), atol=1e-5, rtol=1e-5)
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    number = lambda: float(np.sum(memory_by_hand(wide, x, TOP_K) * cotangent))
    found = in_official_order(gradient[0]) | {"values.weight": np.asarray(gradient[1]["rows"][...])}
    assert found.keys() == arrays.keys()
    for name, got in found.items():
        np.testing.assert_allclose(got, slopes(number, wide[name]), atol=1e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(d_x, slopes(number, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": None}, "feed_forward.keys is missing"),
        ({f"{QUERY}.bias": None}, f"feed_forward.{QUERY}.bias is missing"),
        ({"values.weight": None}, "values.weight is missing"),
        ({"values.weight": (24, DIM)}, "do not fit each other: with n**2 rows of values"),
        ({"keys": (2 * HEADS * N, 3)}, "do not fit each other"),
        ({"value_proj.weight": (DIM, DIM), "value_proj.bias": (DIM,)}, "value_proj without swilu_projection"),
        ({"values_u.weight": (25, DIM)}, "feed_forward.values_u.weight belongs to a PEER layer"),
        ({"query_proj.query_mlps.1.weight": (4, 4)}, "query_mlps.1.weight is not part of this model"),
        ({"swilu_projection.weight": (DIM, DIM)}, "feed_forward.swilu_projection.bias is missing"),
        ({f"{QUERY}.bias": (9,)}, "query_mlps.0.bias has the shape [9], must have [8]"),
    ],
)
def test_impossible_layers_are_refused(change, message):
    arrays = layer_arrays()
    for name, shape in change.items():
        if shape is None:
            del arrays[name]
        else:
            arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError) as error:
        load_layer(arrays, top_k=TOP_K)
    assert message in str(error.value)


def test_weights_that_are_not_floats_are_refused():
    arrays = layer_arrays()
    arrays["keys"] = arrays["keys"].astype(np.int32)
    with pytest.raises(CheckpointError, match="keys is of type int32, must be floating-point"):
        load_layer(arrays)


@pytest.fixture(scope="module")
def fixture_arrays() -> dict[str, np.ndarray]:
    with open_arrays(FIXTURE) as arrays:
        return {name: np.asarray(array) for name, array in arrays.items()}


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of [tokens, heads, head_dim], with neighbours as complex numbers."""
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    frequencies = theta ** (-np.arange(pairs.shape[-1]) / pairs.shape[-1])
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def logits_by_hand(arrays: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    a = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    x = a["tok_embeddings.weight"][tokens]
    for layer in (0, 1):
        block = {name.split(".", 2)[2]: array for name, array in a.items() if name.startswith(f"layers.{layer}.")}
        inputs = rms_norm(x, block["attention_norm.weight"])
        query, key, value = (
            (inputs @ block[f"attention.{name}.weight"].T).reshape(len(tokens), -1, 4) for name in ("wq", "wk", "wv")
        )
        query, key = turned(query, 500.0), np.repeat(turned(key, 500.0), 2, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / 2
        scores = np.where(np.tril(np.ones(scores.shape[1:])), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, np.repeat(value, 2, axis=1)).reshape(len(tokens), -1)
        x = x + attended @ block["attention.wo.weight"].T
        inputs = rms_norm(x, block["ffn_norm.weight"])
        if layer == 0:
            gate, up = (inputs @ block[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
            x = x + (gate * sigmoid(gate) * up) @ block["feed_forward.w2.weight"].T
        else:
            inner = {name.removeprefix("feed_forward."): array for name, array in block.items() if "feed" in name}
            x = x + memory_by_hand(inner, inputs, top_k=3)
    return rms_norm(x, a["norm.weight"]) @ a["output.weight"].T


@pytest.mark.slow
def test_a_whole_checkpoint_becomes_a_run_with_the_same_logits(tmp_path, fixture_arrays):
    config = from_official(FIXTURE, tmp_path / "run", tokenizer="byte")
    assert config.model.memory is not None
    assert (config.model.memory.top_k, config.model.memory.table_dtype) == (3, "bfloat16")
    # A bfloat16 table gives bfloat16 bags; loading in float32 allows an exact comparison.
    model, tokenizer = memjax.load(tmp_path / "run", dtype="float32")
    tokens = [1, 250, 17, 33, 33, 128, 64]
    assert tokenizer.vocab_size <= 260
    got = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([tokens]))[0]
    np.testing.assert_allclose(got, logits_by_hand(fixture_arrays, tokens), atol=1e-5, rtol=1e-5)


SETTINGS = json.loads((FIXTURE / "params.json").read_text())


def test_safetensors_and_torch_give_the_same_model(tmp_path, fixture_arrays):
    save_file(
        {name: np.ascontiguousarray(array) for name, array in fixture_arrays.items()},
        tmp_path / "consolidated.safetensors",
    )
    with open_arrays(tmp_path) as arrays:
        assert arrays.keys() == fixture_arrays.keys()
        for name, array in arrays.items():
            assert np.asarray(array).tobytes() == fixture_arrays[name].tobytes()
            assert np.asarray(array).dtype == fixture_arrays[name].dtype == array.dtype


def two_memory_layers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies the second block to the third, so that both share a table."""
    copied = {name.replace("layers.1", "layers.2"): array for name, array in arrays.items() if "layers.1" in name}
    return arrays | copied


def test_tables_are_shared_if_they_are_equal_or_stored_once(fixture_arrays):
    both, values = two_memory_layers(fixture_arrays), "layers.2.feed_forward.values.weight"
    once = {name: array for name, array in both.items() if name != values}
    other = both | {values: both[values] + 1}
    pools = [sorted(load_decoder(arrays, SETTINGS).tables) for arrays in (both, once, other)]
    assert pools == [["shared"], ["shared"], ["layer_1", "layer_2"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.attention.wo.weight": None}, "layers.0.attention.wo.weight is missing"),
        ({"layers.0.feed_forward.w2.weight": (8, 13)}, "has the shape [8, 13], must have [8, 12]"),
        ({"layers.0.feed_forward.w9.weight": (8, 13)}, "w9.weight is not part of this model"),
        ({"layers.0.feed_forward.values.weight": (16, 5)}, "belongs to no memory layer"),
        ({"layers.0.feed_forward.values_v.weight": (16, 5)}, "belongs to a PEER layer"),
        ({"tok_embeddings.weight": None}, "tok_embeddings.weight is missing"),
        ({"layers.1.attention.wq.weight": None}, "layers.1.attention.wq.weight is missing"),
        ({"layers.0.attention.wq.weight": None}, "layers.0.attention.wq.weight is missing"),
        ({f"layers.{'9' * 5000}.ffn_norm.weight": (8,)}, "not the arrays of an official checkpoint"),
        ({"layers.3.ffn_norm.weight": (8,)}, "has the layers [0, 1, 3], must have all from 0"),
    ],
)
def test_impossible_checkpoints_are_refused_and_nothing_is_written(tmp_path, fixture_arrays, change, message):
    arrays = {name: np.ascontiguousarray(array) for name, array in fixture_arrays.items() if change.get(name, 1)}
    arrays |= {name: np.zeros(shape, np.float32) for name, shape in change.items() if shape}
    (tmp_path / "there").mkdir()
    save_file(arrays, tmp_path / "there/consolidated.safetensors")
    shutil.copy(FIXTURE / "params.json", tmp_path / "there")
    with pytest.raises(CheckpointError) as error:
        from_official(tmp_path / "there", tmp_path / "run", tokenizer="byte")
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "params.json must have n_heads or head_dim"),
        ({"n_heads": 3}, "n_heads=3 and head_dim=None in params.json do not fit queries of width 8"),
        ({"n_heads": "2"}, "n_heads=2 and head_dim=None"),
        ({"n_heads": 2, "mem_knn": 5}, "top_k=5 must be in 1..num_keys=4"),
        ({"n_heads": 2, "mem_knn": "x"}, "describes an impossible model"),
        ({"n_heads": 1}, "do not fit queries of width 8 and keys of width 4"),
        ({"n_heads": True}, "n_heads=True and head_dim=None"),
        ({"n_heads": 2, "rope_theta": 10**400}, "in params.json must be a positive number"),
        ({"n_heads": 2, "rope_theta": "5e5"}, "rope_theta=5e5 in params.json must be a positive number"),
        ({"n_heads": 2, "norm_eps": [1]}, "norm_eps=[1] in params.json must be a positive number"),
        (
            {"n_heads": 2, "use_scaled_rope": True},
            "use_scaled_rope=True in params.json asks for scaled rotary frequencies",
        ),
    ],
)
def test_impossible_settings_are_refused(fixture_arrays, settings, message):
    with pytest.raises(CheckpointError) as error:
        load_decoder(fixture_arrays, settings)
    assert message in str(error.value)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"params\.json: is missing"):
        from_official(tmp_path, tmp_path / "run")
    shutil.copy(FIXTURE / "params.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither consolidated\.safetensors nor consolidated\.pth"):
        from_official(tmp_path, tmp_path / "run", tokenizer="byte")
    with pytest.raises(ConfigError, match="not empty"):
        from_official(FIXTURE, tmp_path)
