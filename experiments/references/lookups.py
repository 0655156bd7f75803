"""Compares memory layers and PEER with lucidrains' product-key-memory and PEER-pytorch, in float64."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from checks import Check, relative
from flax import nnx
from PEER_pytorch import PEER
from product_key_memory import PKM

from memjax.memory.keys import ProductKeys
from memjax.memory.layer import MemoryLayer
from memjax.memory.peer import PEERLayer
from memjax.memory.table import ValueTable

DIM, HEADS, KEYS, PICKS, HALF = 12, 3, 6, 4, 5
SIZES = {"num_keys": KEYS, "num_heads": HEADS, "top_k": PICKS, "key_dim": 2 * HALF, "qk_norm": False}
FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def lookups() -> Iterator[Check]:
    """Compares outputs, and gradients of everything that is trained."""
    with jax.enable_x64(True):
        torch.manual_seed(0)
        theirs = PKM(DIM, heads=HEADS, num_keys=KEYS, topk=PICKS, dim_head=HALF).double()
        theirs.norm = torch.nn.Identity()  # which memjax does not have
        layer = MemoryLayer(DIM, **SIZES, score_scale=1.0, gate="none", **FLOAT64, rngs=nnx.Rngs(0))
        figure = _compare(theirs, layer, layer.keys, theirs.to_queries, [theirs.values])
        yield Check("layers", "Memory", "product-key-memory", "output and gradients, float64", figure, 1e-13)

        theirs = PEER(
            DIM, heads=HEADS, num_experts=KEYS**2, num_experts_per_head=PICKS, dim_key=HALF, non_competing_scores=False
        ).double()
        layer = PEERLayer(DIM, **SIZES, score_scale=1.0, **FLOAT64, rngs=nnx.Rngs(0))
        tables = [theirs.weight_down_embed, theirs.weight_up_embed]
        figure = _compare(theirs, layer, layer.keys, theirs.to_queries[0], tables)
        yield Check("layers", "PEER", "PEER-pytorch", "output and gradients, float64", figure, 1e-13)


def _compare(
    theirs: torch.nn.Module,
    layer: MemoryLayer | PEERLayer,
    keys: ProductKeys,
    queries: torch.nn.Linear,
    embeddings: list[torch.nn.Module],
) -> float:
    """The largest difference if both have the same random parameters."""
    rng = np.random.default_rng(0)
    weights: list[torch.Tensor] = [embedding.weight for embedding in embeddings]  # pyright: ignore
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))
    keys.query_kernel[...] = _kernel(queries.weight)
    keys.query_bias[...] = jnp.zeros_like(keys.query_bias[...])
    keys.keys[...] = _keys(theirs.keys)
    tables = tuple(ValueTable(KEYS**2, DIM, dtype=jnp.float64, rngs=nnx.Rngs(0)) for _ in weights)
    for table, weight in zip(tables, weights, strict=True):
        table.rows[...] = jnp.asarray(weight.detach().numpy())
    x, cotangent = rng.normal(size=(2, 2, 7, DIM))

    def loss(both: tuple[nnx.Module, tuple[ValueTable, ...]], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        model, tables = both
        out = model(x, *tables)  # pyright: ignore
        return (out * cotangent).sum(), out

    own = nnx.grad(loss, argnums=(0, 1), has_aux=True)((layer, tables), jnp.asarray(x))
    ((of_layer, of_tables), of_x), out = own
    inputs = torch.tensor(x, requires_grad=True)
    expected = theirs(inputs)
    (expected * torch.tensor(cotangent)).sum().backward()
    assert inputs.grad is not None
    pairs = [(out, expected.detach()), (of_x, inputs.grad)]
    pairs.append((of_layer["keys"]["query_kernel"][...], _kernel(queries.weight.grad)))
    pairs.append((of_layer["keys"]["keys"][...], _keys(theirs.keys.grad)))
    pairs += [(of_tables[n]["rows"][...], weight.grad) for n, weight in enumerate(weights)]
    return max(relative(found, wanted) for found, wanted in pairs)


def _kernel(weight: torch.Tensor | None) -> jax.Array:
    """Queries [halves, heads, half, dim] as [dim, heads, halves, half]."""
    assert weight is not None
    parts = weight.detach().numpy().reshape(2, HEADS, HALF, DIM)
    return jnp.asarray(parts.transpose(3, 1, 0, 2).reshape(DIM, -1))


def _keys(keys: torch.Tensor) -> jax.Array:
    """Keys [heads, n, halves, half] as [heads, halves, n, half]."""
    return jnp.asarray(keys.detach().numpy().transpose(0, 2, 1, 3))
