"""PEER: a few single-unit experts, retrieved from very many, in place of a feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from memjax.config.memory import PEERConfig
from memjax.config.section import with_settings
from memjax.memory import sharded
from memjax.memory.keys import Lookup, ProductKeys
from memjax.memory.lookup import LookupLayer
from memjax.memory.read import Perturbations, TableRead
from memjax.memory.table import ValueTable
from memjax.ops.table import Table
from memjax.sharding.axes import fold, unfold


class PEERLayer(LookupLayer):
    """Parameter-efficient expert retrieval (PEER, arXiv:2407.04153): y = sum of weight * gelu(<x, u>) * v.

    Product keys select the experts of each token; u and v are an expert's rows in the tables `inputs` and `outputs`.
    The model owns the tables and passes them in, so that several layers can share them:

        inputs, outputs = (ValueTable(num_slots=64**2, value_dim=256, rngs=rngs) for _ in range(2))
        layer = PEERLayer(256, num_keys=64, num_heads=4, top_k=8, key_dim=128, rngs=rngs)
        y = layer(x, inputs, outputs)

    It trains under plain autodiff with any optimizer; `memjax.value_and_grad` avoids two gradients of the tables' size.
    """

    READS = ("dot", "bag")

    def __init__(
        self,
        dim: int,
        config: PEERConfig | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        """A layer of width dim over num_keys ** 2 experts.

        Args:
            dim: width of inputs and outputs, and of the tables' rows.
            config: the layer's settings; None takes the defaults.
            dtype: type of activations; None takes the common type of inputs and parameters.
            param_dtype: type of the parameters.
            implementation: implementation of search, dot and bag; None takes the fastest that can run.
            rngs: source of the `params` key.
            **settings: fields of `PEERConfig` that replace those of config.

        Raises:
            TypeError: a setting is unknown.
            ValueError: key_dim is odd, num_keys cannot offer top_k experts, or a number is out of its range.
        """
        config = with_settings(type(self), config or PEERConfig(), settings)
        self.dim, self.picks, self.implementation = dim, config.picks, implementation
        self.keys = ProductKeys(
            dim, config, dtype=dtype, param_dtype=param_dtype, implementation=implementation, rngs=rngs
        )

    def lookup(self, x: Float[Array, "*b dim"]) -> Lookup:
        """The experts that each token uses and their softmax weights; batch axes are folded into tokens."""
        return self.keys(x)

    def with_reads(
        self, x: Float[Array, "*b dim"], *tables: ValueTable, perturbations: Perturbations | None = None
    ) -> tuple[Float[Array, "*b dim"], tuple[TableRead, ...]]:
        (inputs, outputs), (dot, bag) = tables, self.perturbations_of(perturbations)
        indices, softmax = self.lookup(x)
        x = self.keys.promoted(x)
        dots, vectors = sharded.dot(
            self._rows(inputs, "inputs"), indices, fold(x), dot, implementation=self.implementation
        )
        weights = softmax * jax.nn.gelu(dots, approximate=False)
        out = sharded.bag(self._rows(outputs, "outputs"), indices, weights, bag, implementation=self.implementation)
        reads = TableRead.dot(inputs, indices, vectors), TableRead.bag(outputs, indices, weights)
        return unfold(out, x).astype(x.dtype), reads

    def _rows(self, table: ValueTable, name: str) -> Table | Float[Array, "n dim"]:
        return table.rows_for(self.keys.num_slots, self.dim, name=f"the table of the experts' {name}")
