import pytest

from memjax.data.tokenizers.base import ByteTokenizer
from memjax.data.tokenizers.bpe import BpeTokenizer, train_bpe

CORPUS = ["the cat sat on the mat", "naïve café, naïve café", "日本語の日本語", "def f(x):\n\treturn x  # x"] * 4


def test_training_is_repeatable_and_keeps_to_its_size():
    first, second, other = (train_bpe(CORPUS[:n], 290) for n in (16, 16, 1))
    assert first.to_state() == second.to_state()
    assert first.fingerprint != other.fingerprint != ByteTokenizer().fingerprint
    assert first.vocab_size <= 290
    assert train_bpe([], 259).vocab_size == 259
    assert len(first.encode("the cat")) < 7
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        train_bpe(CORPUS, 258)


def test_anything_but_a_state_is_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        BpeTokenizer({"model": 3})
