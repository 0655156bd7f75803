"""Whether a short answer is right: exact match and F1 of words, normalised as for SQuAD (arXiv:1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text in small letters, without ASCII punctuation, without the words a, an and the, single spaces between."""
    without = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


def exact_match(answer: str, accepted: str) -> float:
    """1 where both are the same once they are normalised, else 0."""
    return float(normalised(answer) == normalised(accepted))


def f1(answer: str, accepted: str) -> float:
    """Harmonic mean of the shares of either's words that the other has too; without words, whether both have none."""
    given, wanted = normalised(answer).split(), normalised(accepted).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def best(measure: Callable[[str, str], float], answer: str, accepted: Iterable[str]) -> float:
    """The measure against the accepted answer that fits best."""
    return max(measure(answer, one) for one in accepted)
