"""What a model knows: questions answered exactly, which of two answers is likelier, bits per byte."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from continual.facts import Asked, NewFact
from memjax.data.tokenizers.base import Tokenizer
from memjax.evaluation.perplexity import bits_per_byte
from memjax.evaluation.recall import answer_requests
from memjax.inference.scoring import Score, score
from memjax.models.decoder import Decoder

LENGTH = 128
"""Tokens of the longest question with its answer."""
BATCH = 512


class Questions:
    """Questions made to tokens once, asked of many models."""

    def __init__(self, tokenizer: Tokenizer, asked: Sequence[Asked], *, end: bool = True):
        """`end`: whether the answer must also stop there."""
        self.requests = answer_requests(tokenizer, asked, end=end)

    def scores(self, model: Decoder) -> list[Score]:
        """Of each."""
        return score(model, self.requests, max_length=LENGTH, batch_size=BATCH)

    def right(self, model: Decoder) -> np.ndarray:
        """Which are answered exactly: the likeliest token after each, end of text included."""
        return np.array([found.is_greedy for found in self.scores(model)])


class OfFacts:
    """New facts in the wordings that were learned and in those that were not, one after the other."""

    def __init__(self, tokenizer: Tokenizer, facts: Sequence[NewFact]):
        self.counts = [len(fact.asked) for fact in facts]
        self._asked = Questions(tokenizer, [Asked(prompt, fact.answer) for fact in facts for prompt in fact.asked])
        self._learned = Questions(tokenizer, [Asked(fact.learned[0], fact.answer) for fact in facts])

    def measure(self, model: Decoder) -> dict[str, Any]:
        """Shares that are answered exactly."""
        return {
            "paraphrases": float(self._asked.right(model).mean()),
            "as_learned": float(self._learned.right(model).mean()),
        }

    def paraphrases(self, model: Decoder) -> np.ndarray:
        """The share of each fact's wordings that is answered."""
        ends = np.cumsum(self.counts)
        return np.array([part.mean() for part in np.split(self._asked.right(model), ends[:-1])])


class OfEdits:
    """CounterFact: whether the new answer is likelier than the one before, and the neighbours' the other way round."""

    def __init__(self, tokenizer: Tokenizer, facts: Sequence[NewFact]):
        kinds = {
            "efficacy": [(fact.learned[0], fact.answer, fact.instead) for fact in facts],
            "paraphrase": [(fact.asked[0], fact.answer, fact.instead) for fact in facts],
            "neighbourhood": [(fact.neighbour, fact.instead, fact.answer) for fact in facts],
        }
        both = lambda prompt, *answers: [Asked(prompt, answer) for answer in answers]
        self._pairs = {
            name: Questions(tokenizer, list(itertools.chain(*(both(*one) for one in rows))), end=False)
            for name, rows in kinds.items()
        }

    def measure(self, model: Decoder) -> dict[str, Any]:
        """Shares in which the first of the two is likelier, and their harmonic mean."""
        shares = {}
        for name, questions in self._pairs.items():
            found = np.array([one.log_likelihood for one in questions.scores(model)]).reshape(-1, 2)
            shares[name] = float((found[:, 0] > found[:, 1]).mean())
        mean = len(shares) / sum(1 / max(share, 1e-9) for share in shares.values())
        return {**shares, "score": mean}


def text_bits(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str], length: int) -> float:
    """Bits per byte of texts that no training has shown."""
    return bits_per_byte(model, tokenizer, texts, sequence_length=length, batch_size=64).bits_per_byte
