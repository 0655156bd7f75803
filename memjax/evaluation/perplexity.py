"""Likelihood of text: nats per token on batches, bits per byte on documents of any length."""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import checks
from memjax.data.packing import Batch
from memjax.data.tokenizers.base import Tokenizer
from memjax.inference.scoring import Place, ScoreRequest, score, to_device
from memjax.models.decoder import Decoder
from memjax.models.loss import token_losses
from memjax.models.token_ids import check_ids

_TEXTS_AT_ONCE = 64
"""Texts tokenised per call; a BPE tokenizer spreads them over the cores."""
_BATCHES_AT_ONCE = 16
"""Batches of windows that are sorted by length together."""


class TextScore(NamedTuple):
    """Likelihood of a text under a model."""

    bits_per_byte: float
    """Bits per byte of UTF-8 text; comparable across tokenizers."""
    loss_per_token: float
    """Nats per token."""
    bytes: int
    """UTF-8 bytes that the tokens represent; what a tokenizer drops is neither predicted nor counted."""
    tokens: int
    """Tokens predicted: all of the text's, no special ones."""


def validation_loss(model: Decoder, batches: Iterable[Batch], *, place: Place = to_device) -> float:
    """Mean nats per learned token; NaN if no token is learned.

    Compiled once per batch shape and model structure, however often it is called. The model's arrays may be sharded
    over an ambient mesh.

    Raises:
        ValueError: a token id is outside the vocabulary.
    """
    graphdef, state = nnx.split(model)
    sums: list[Any] = []
    for batch in batches:
        for name in ("tokens", "targets"):
            check_ids(batch[name], model.config.vocab_size, f"the {name} of a batch")
        sums.append(_batch_loss(graphdef, state, place(batch)))
        if len(sums) > 1:
            # One batch computes while the next is prepared; more in flight would use memory and delay interrupts.
            jax.block_until_ready(sums[-2])
    losses, counts = np.asarray(jax.device_get(sums), np.float64).reshape(-1, 2).sum(axis=0)
    return float(losses / counts) if counts else math.nan


def bits_per_byte(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    sequence_length: int,
    batch_size: int = 32,
    stride: int | None = None,
    max_bytes: int | None = None,
) -> TextScore:
    """The model's code length for documents, each predicted after a begin token; every token counts exactly once.

    Documents longer than a window are read in windows that start `stride` tokens apart. Each window counts only the
    tokens that no earlier one counted, so these have at least sequence_length - stride tokens of context.

    Args:
        model: the model.
        tokenizer: the one it was trained with.
        texts: the documents; empty ones are skipped.
        sequence_length: tokens per window.
        batch_size: windows per batch; under a mesh, a multiple of its devices.
        stride: tokens between the starts of two windows; None is half a window. sequence_length is fastest, but gives
            the first tokens of a window no context.
        max_bytes: stops after this many bytes of text, cut between characters; None reads all.

    Raises:
        ValueError: there is no text, a number is not a positive integer, or stride is not in 1..sequence_length.
        TypeError: a document is not a str.
    """
    limits = {} if max_bytes is None else {"max_bytes": max_bytes}
    checks.refuse(checks.counts(sequence_length=sequence_length, batch_size=batch_size, **limits))
    stride = max(1, sequence_length // 2) if stride is None else stride
    checks.refuse(checks.whole_number(stride=stride))
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"stride={stride} must be in 1..sequence_length={sequence_length}: it would leave tokens out")
    num_bytes = num_tokens = 0
    nats = 0.0

    def windows() -> Iterator[ScoreRequest]:
        nonlocal num_bytes, num_tokens
        limited = _limit(checks.several(texts), max_bytes)
        while some := list(itertools.islice(limited, _TEXTS_AT_ONCE)):
            for ids in tokenizer.encode_batch(some):
                # What a tokenizer drops was not predicted, and must not be counted either.
                num_bytes += tokenizer.num_bytes(ids)
                num_tokens += len(ids)
                yield from _windows([tokenizer.bos_id, *ids], sequence_length, stride)

    ahead = windows()
    while some := list(itertools.islice(ahead, _BATCHES_AT_ONCE * batch_size)):
        nats -= sum(one.log_likelihood for one in score(model, some, batch_size=batch_size))
    if not num_bytes:
        cut = "" if max_bytes is None else f", or its first character is longer than max_bytes={max_bytes}"
        raise ValueError(f"there is no text to score: every document is empty{cut}")
    return TextScore(nats / math.log(2) / num_bytes, nats / num_tokens, num_bytes, num_tokens)


def _limit(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The non-empty texts, up to max_bytes in total; the last may be cut between two characters."""
    left = math.inf if max_bytes is None else max_bytes
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a document must be a string, found {type(text).__name__}")
        size = len(text.encode())
        if size > left:
            text = text.encode()[: int(left)].decode(errors="ignore")
        if text:
            yield text
        left -= size
        if left <= 0:
            return


def _windows(ids: list[int], sequence_length: int, stride: int) -> Iterator[ScoreRequest]:
    """Windows that start stride tokens apart; the continuation of each is what no earlier window has predicted."""
    counted = 1
    for start in range(0, len(ids) - 1, stride):
        if counted == len(ids):
            return
        stop = min(start + sequence_length + 1, len(ids))
        yield ScoreRequest(ids[start:counted], ids[counted:stop])
        counted = stop


@partial(jax.jit, static_argnums=0)
def _batch_loss(graphdef: Any, state: nnx.State, batch: dict[str, Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed loss of the target tokens, and their number."""
    model = nnx.merge(graphdef, state)
    # Without segments, padding at the end is harmless, because attention is causal.
    hidden = model.hidden(batch["tokens"], batch.get("positions"), batch.get("segments")).states
    return jnp.sum(token_losses(model, hidden, batch["targets"]) * batch["loss_mask"]), batch["loss_mask"].sum()
