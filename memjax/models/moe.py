"""A mixture of experts: several feed-forward layers, a few of which process each token."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.config import checks
from memjax.config.model import ExpertsConfig
from memjax.config.section import with_settings
from memjax.models.feed_forward import linear
from memjax.ops.grouped_matmul.api import grouped_matmul
from memjax.ops.precision import accumulator, init_in_float32
from memjax.ops.shapes import require
from memjax.sharding.axes import on_own_tokens
from memjax.sharding.rules import named

SAVED_ROUTING = "routing"
"""`checkpoint_name` of the routing: if it is kept, rematerialisation neither chooses nor sorts again."""


_ONE_EACH = "token_mask must have one value for each token"


class Routing(NamedTuple):
    """Output of a router for each token."""

    logits: Float[Array, "t e"]
    """Scores of the experts, in float32 or wider."""
    picks: Int[Array, "t k"]
    """The experts that each token chooses, best first; with expert choice in training, those that it would choose."""


class RouterStatistics(NamedTuple):
    """Router statistics over many tokens."""

    balance: Float[Array, ""]
    """The load-balance loss of arXiv:2101.03961, experts * sum of load * mean probability: 1 if all is even."""
    z: Float[Array, ""]
    """The z loss of arXiv:2202.08906: the mean square of the logits' logsumexp."""
    entropy: Float[Array, ""]
    """Mean entropy of a token's probabilities, in nats."""
    load: Float[Array, " e"]
    """Each expert's share of the choices."""


def router_statistics(routing: Routing, token_mask: Bool[Array, " t"]) -> RouterStatistics:
    """Statistics of the tokens in the mask; all zero if there are none."""
    fits = token_mask.shape == routing.logits.shape[:1]
    require("router_statistics", fits, _ONE_EACH, logits=routing.logits, token_mask=token_mask)
    num_experts, wide = routing.logits.shape[1], routing.logits.dtype
    share = token_mask.astype(wide) / jnp.maximum(token_mask.sum(dtype=wide), 1)
    log_probabilities = jax.nn.log_softmax(routing.logits)
    probabilities = jnp.exp(log_probabilities)
    chosen = jax.nn.one_hot(routing.picks, num_experts, dtype=wide).mean(axis=1)
    load = share @ chosen
    return RouterStatistics(
        balance=num_experts * jnp.sum(load * (share @ probabilities)),
        z=share @ jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)),
        entropy=-share @ jnp.sum(probabilities * log_probabilities, axis=-1),
        load=load,
    )


class MoE(nnx.Module):
    """SwiGLU experts behind a router: out = sum over a token's experts of probability * expert(x).

    Token choice is dropless: every token is routed to its top_k most probable experts. With expert choice
    (arXiv:2202.09368), each expert takes its most probable tokens of every sequence during training: a share of
    capacity / experts, so that all experts do the same amount of work. A token's output then depends on later tokens
    too, so in generation and evaluation each token takes its most probable expert instead.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        config: ExpertsConfig | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        """Experts of width hidden_dim, initialised like feed-forward layers.

        Args:
            dim: width of inputs and outputs.
            hidden_dim: hidden width of each expert.
            config: their number and routing; None takes the defaults.
            dtype: type of activations; None takes that of the inputs.
            param_dtype: type of the parameters.
            implementation: implementation of `grouped_matmul`; None takes the fastest that can run.
            rngs: source of the `params` key.
            **settings: fields of `ExpertsConfig` that replace those of config.

        Raises:
            TypeError: a setting is unknown.
            ValueError: `routing` is unknown, or a number is out of its range.
        """
        checks.refuse(checks.counts(dim=dim, hidden_dim=hidden_dim))
        config = with_settings(type(self), config or ExpertsConfig(), settings)
        self.num_experts, self.routing, self.top_k = config.num_experts, config.routing, config.chosen
        self.renormalize, self.capacity, num_experts = config.renormalize, config.capacity_factor, config.num_experts
        self.dtype, self.implementation = dtype, implementation
        self.router = linear(
            dim, num_experts, axes=("embed", "experts"), dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

        def matrices(inputs: int, outputs: int, *axes: str) -> nnx.Param:
            init = init_in_float32(nnx.initializers.truncated_normal(inputs**-0.5, lower=-3.0, upper=3.0))
            return nnx.Param(
                init(rngs.params(), (num_experts, inputs, outputs), param_dtype), **named("experts", *axes)
            )

        self.gate = matrices(dim, hidden_dim, "embed", "expert_ffn")
        self.up = matrices(dim, hidden_dim, "embed", "expert_ffn")
        self.down = matrices(hidden_dim, dim, "expert_ffn", "embed")

    def __call__(
        self, x: Float[Array, "b s dim"], token_mask: Bool[Array, "b s"] | None = None, *, training: bool = False
    ) -> tuple[Float[Array, "b s dim"], Routing]:
        """The layer's output, and the router's.

        With expert choice, experts choose tokens only in training, and only those where token_mask is true (None: all).

        Raises:
            ValueError: shapes do not fit together.
        """
        dim = self.router.kernel.shape[0]
        require("MoE", x.ndim == 3 and x.shape[2] == dim, f"x must be [batch, sequence, {dim}]", x=x)
        mask = jnp.ones(x.shape[:2], bool) if token_mask is None else token_mask
        require("MoE", mask.shape == x.shape[:2], _ONE_EACH, x=x, token_mask=mask)
        x = x.astype(self.dtype or x.dtype)
        tokens = x.reshape(x.shape[0] * x.shape[1], dim)
        weights = [matrices[...].astype(x.dtype) for matrices in (self.gate, self.up, self.down)]
        logits = checkpoint_name(self._logits(tokens), SAVED_ROUTING)
        if not training or self.routing == "token_choice":
            settings = {"top_k": self.top_k, "renormalize": self.renormalize, "implementation": self.implementation}
            out, picks = on_own_tokens(_token_choice, (tokens, logits), weights, **settings)
            return out.reshape(x.shape), Routing(logits, picks)
        of_sequences = (x, logits.reshape(*x.shape[:2], self.num_experts), mask)
        out, picks = on_own_tokens(_expert_choice, of_sequences, weights, capacity=self.capacity)
        return out, Routing(logits, picks.reshape(tokens.shape[0], 1))

    def _logits(self, tokens: Float[Array, "t dim"]) -> Float[Array, "t e"]:
        # In the tokens' type, in which weights are sent over a mesh, so that all meshes choose alike.
        kernel = self.router.kernel[...].astype(tokens.dtype)
        return jnp.matmul(tokens, kernel, preferred_element_type=accumulator(tokens.dtype))


def _choose(logits: Float[Array, "*t e"], top_k: int) -> Int[Array, "*t k"]:
    return checkpoint_name(jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)[1], SAVED_ROUTING)


def _token_choice(
    x: Float[Array, "t dim"],
    logits: Float[Array, "t e"],
    gate: Float[Array, "e dim f"],
    up: Float[Array, "e dim f"],
    down: Float[Array, "e f dim"],
    *,
    top_k: int,
    renormalize: bool,
    implementation: str | None,
) -> tuple[Float[Array, "t dim"], Int[Array, "t k"]]:
    """Sends every token through its top_k experts."""
    picks = _choose(logits, top_k)
    weights = jnp.take_along_axis(jax.nn.softmax(logits), picks, axis=-1)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    order = checkpoint_name(jnp.argsort(picks.ravel()), SAVED_ROUTING)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True).reshape(picks.shape)
    sizes = jnp.bincount(picks.ravel(), length=logits.shape[1]).astype(jnp.int32)
    product = partial(grouped_matmul, sizes=sizes, implementation=implementation)

    rows = _to_experts(x, order, places)
    found = _from_experts(product(nnx.silu(product(rows, gate)) * product(rows, up), down), order, places)
    return jnp.sum(found.astype(weights.dtype) * weights[:, :, None], axis=1).astype(x.dtype), picks


def _expert_choice(
    x: Float[Array, "b s dim"],
    logits: Float[Array, "b s e"],
    token_mask: Bool[Array, "b s"],
    gate: Float[Array, "e dim f"],
    up: Float[Array, "e dim f"],
    down: Float[Array, "e f dim"],
    *,
    capacity: float,
) -> tuple[Float[Array, "b s dim"], Int[Array, "b s 1"]]:
    """Sends the most probable tokens of each sequence through every expert.

    Each sequence is routed separately, so that the result does not depend on the sharding. No expert takes padding.
    """
    length, num_experts = logits.shape[1:]
    most = math.ceil(length * capacity / num_experts)
    probabilities = jnp.swapaxes(jax.nn.softmax(logits), 1, 2)
    # Below every probability, so that padding is taken last.
    wanted = jax.lax.stop_gradient(jnp.where(token_mask[:, None, :], probabilities, -1.0))
    chosen = checkpoint_name(jax.lax.top_k(wanted, most)[1], SAVED_ROUTING)
    allowed = jnp.ceil(token_mask.sum(axis=1).astype(float) * capacity / num_experts).astype(jnp.int32)
    weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    weights = jnp.where(jnp.arange(most, dtype=jnp.int32)[None, None, :] < allowed[:, None, None], weights, 0)

    sequence = jnp.arange(x.shape[0])[:, None, None]
    rows = x[sequence, chosen]
    hidden = nnx.silu(jnp.einsum("becd,edf->becf", rows, gate)) * jnp.einsum("becd,edf->becf", rows, up)
    found = jnp.einsum("becf,efd->becd", hidden, down).astype(weights.dtype) * weights[..., None]
    out = jnp.zeros(x.shape, found.dtype).at[sequence, chosen].add(found)
    return out.astype(x.dtype), _choose(logits, 1)


# Both moves are permutations (of tokens repeated top_k times), so each one's gradient is a gather too; autodiff would
# scatter rows in random order and sum them in 16 bits.
@jax.custom_vjp
def _to_experts(x: Float[Array, "t dim"], order: Int[Array, " m"], places: Int[Array, "t k"]) -> Float[Array, "m dim"]:
    """Tokens in the order of their experts: row i is the token of pick order[i]."""
    return x[order // places.shape[1]]


@jax.custom_vjp
def _from_experts(
    rows: Float[Array, "m dim"], order: Int[Array, " m"], places: Int[Array, "t k"]
) -> Float[Array, "t k dim"]:
    """The experts' outputs in the order of the picks: that of pick (t, j) is row places[t, j]."""
    return rows[places]


def _to_experts_backward(residuals, cotangent):
    order, places = residuals
    wide = _from_experts(cotangent, order, places).astype(accumulator(cotangent.dtype))
    return wide.sum(axis=1).astype(cotangent.dtype), None, None


def _from_experts_backward(residuals, cotangent):
    order, _ = residuals
    return cotangent.reshape(order.size, -1)[order], None, None


_to_experts.defvjp(lambda x, order, places: (_to_experts(x, order, places), (order, places)), _to_experts_backward)
_from_experts.defvjp(
    lambda rows, order, places: (_from_experts(rows, order, places), (order, places)), _from_experts_backward
)
