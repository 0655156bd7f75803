"""Metrics of short answers: exact match and F1 of words, normalised as for SQuAD (arXiv:1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text in lower case, without ASCII punctuation and the words a, an and the, with single spaces."""
    without = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


def exact_match(answer: str, accepted: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    return float(normalised(answer) == normalised(accepted))


def f1(answer: str, accepted: str) -> float:
    """Harmonic mean of the precision and recall of words; if one has no words, whether both have none."""
    given, wanted = normalised(answer).split(), normalised(accepted).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def best(measure: Callable[[str, str], float], answer: str, accepted: Iterable[str]) -> float:
    """The largest value of the measure over the accepted answers."""
    return max(measure(answer, one) for one in accepted)
