"""What `learn` says about facts that it cannot teach, and the advice when some remain unknown."""

import numpy as np

from memjax.data.tokenizers.base import ByteTokenizer
from memjax.knowledge.facts import Fact
from memjax.knowledge.finetune import Recipe
from memjax.knowledge.learning import advice, shown, too_long
from memjax.runs.patches.patch import Patch, RowChange

RECIPE = Recipe(rows=8, lr=0.05, epochs=4, batch_size=2)
ROW = RowChange(4, np.array([1]), np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))


def test_a_patch_without_rows_is_not_answered_with_more_passes():
    changed, unchanged = Patch("base", {"shared": ROW}), Patch("base", {})
    assert advice(changed, 1.0, RECIPE) is None
    assert "more passes (--epochs 8) or a higher rate (--lr 0.1)" in str(advice(changed, 0.5, RECIPE))
    for known in (0.5, 1.0):
        found = str(advice(unchanged, known, RECIPE))
        assert found.startswith("no row has changed: ")
        assert "--background" in found
        assert "--epochs" not in found


def test_facts_longer_than_the_context_are_named():
    facts = [Fact.of_fields({"prompt": "Who?", "answer": answer}) for answer in ("me", "you and me")]
    # The begin token, 4 bytes, a space and 10 more predict 15 and the end.
    assert too_long(facts, ByteTokenizer(), 16) is None
    found = str(too_long(facts, ByteTokenizer(), 15))
    assert found.startswith("too long for the 15 tokens that the model was trained on")
    assert "1 of 2 facts, such as 'Who? you and me'" in found


def test_the_first_ten_unknown_questions_are_shown():
    questions = [Fact.of_fields({"prompt": f"Who is {number}?", "answer": "x"}).wordings[0] for number in range(12)]
    assert shown(questions[:1]) == ["  'Who is 0?': 'x'"]
    assert len(shown(questions)) == 11
    assert shown([Fact.of_fields({"prompt": "誰" * 101, "answer": "x"}).wordings[0]]) == [f"  '{'誰' * 96} ...': 'x'"]
    assert shown(questions)[-1] == "  and 2 more"
