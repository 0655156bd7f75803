"""How likely a model holds the tokens of a prompt."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from memjax.inference.engine import TokenLogprobs, padded_length
from memjax.inference.sampling import Likelihoods, likelihoods
from memjax.inference.weights import prepare
from memjax.models.decoder import Decoder
from memjax.sharding.axes import everywhere, has_memory_axis, split_tokens

_PLACES = 256
"""Places whose logits are in memory at once."""


class PromptScorer:
    """Log-probabilities of prompts, one prompt at a time; one program compiles for each power of two of tokens."""

    def __init__(self, model: Decoder):
        """Takes the weights that an `Engine` for this model has; they are in memory once."""
        graphdef, self._weights = nnx.split(prepare(model))

        @functools.partial(jax.jit, static_argnames="num_top")
        def run(weights: nnx.State, tokens: Int[Array, "b s"], *, num_top: int) -> Likelihoods:
            """Of the first row: how likely each token's successor is, and the likeliest ones."""
            model = nnx.merge(graphdef, weights)
            hidden, _ = model.hidden_with_cache(split_tokens(tokens), None)
            places = min(_PLACES, tokens.shape[1])
            states = everywhere(hidden)[0].reshape(-1, places, hidden.shape[-1])
            following = jnp.roll(tokens[0], -1).reshape(-1, places)
            found = jax.lax.map(lambda one: likelihoods(model.logits(one[0]), one[1], num_top), (states, following))
            return jax.tree.map(lambda array: everywhere(array.reshape(-1, *array.shape[2:])), found)

        self._run = run

    def __call__(self, prompt_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """The log-probability of every token but the first, and the num_top likeliest tokens at its place."""
        rows = jax.sharding.get_abstract_mesh().size if has_memory_axis() else 1
        tokens = np.zeros((rows, padded_length(len(prompt_ids))), np.int32)
        tokens[:, : len(prompt_ids)] = prompt_ids
        found = jax.device_get(self._run(self._weights, tokens, num_top=num_top))
        return [
            TokenLogprobs(float(chosen), dict(zip(ids.tolist(), top.tolist(), strict=True)))
            for chosen, top, ids in zip(found.chosen, found.top, found.top_tokens, strict=True)
        ][: len(prompt_ids) - 1]
