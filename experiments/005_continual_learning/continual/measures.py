"""Measures of a model's knowledge: exact answers, which of two answers is more likely, bits per byte."""

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
"""Maximum number of tokens of a question with its answer."""
BATCH = 512


class Questions:
    """Questions tokenised once, to test many models."""

    def __init__(self, tokenizer: Tokenizer, asked: Sequence[Asked], *, end: bool = True):
        """`end`: whether the answer must be followed by the end of text."""
        self.requests = answer_requests(tokenizer, asked, end=end)

    def scores(self, model: Decoder) -> list[Score]:
        """The score of each answer."""
        return score(model, self.requests, max_length=LENGTH, batch_size=BATCH)

    def right(self, model: Decoder) -> np.ndarray:
        """Which questions are answered exactly, by greedy decoding including the end of text."""
        return np.array([found.is_greedy for found in self.scores(model)])


class OfFacts:
    """Tests new facts in wordings that were taught and in others."""

    def __init__(self, tokenizer: Tokenizer, facts: Sequence[NewFact]):
        self.counts = [len(fact.asked) for fact in facts]
        self._asked = Questions(tokenizer, [Asked(prompt, fact.answer) for fact in facts for prompt in fact.asked])
        self._learned = Questions(tokenizer, [Asked(fact.learned[0], fact.answer) for fact in facts])

    def measure(self, model: Decoder) -> dict[str, Any]:
        """Shares of questions answered exactly."""
        return {
            "paraphrases": float(self._asked.right(model).mean()),
            "as_learned": float(self._learned.right(model).mean()),
        }

    def paraphrases(self, model: Decoder) -> np.ndarray:
        """The share of each fact's test wordings that are answered."""
        ends = np.cumsum(self.counts)
        return np.array([part.mean() for part in np.split(self._asked.right(model), ends[:-1])])


class OfEdits:
    """CounterFact: whether the new answer is more likely than the old one, and the reverse for neighbours."""

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
        """Shares in which the expected answer of the two is more likely, and their harmonic mean."""
        shares = {}
        for name, questions in self._pairs.items():
            found = np.array([one.log_likelihood for one in questions.scores(model)]).reshape(-1, 2)
            shares[name] = float((found[:, 0] > found[:, 1]).mean())
        mean = len(shares) / sum(1 / max(share, 1e-9) for share in shares.values())
        return {**shares, "score": mean}


def text_bits(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str], length: int) -> float:
    """Bits per byte of held-out texts."""
    return bits_per_byte(model, tokenizer, texts, sequence_length=length, batch_size=64).bits_per_byte
