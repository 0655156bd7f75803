"""The advice of `learn` when facts remain unknown."""

import numpy as np

from memjax.knowledge.finetune import Recipe
from memjax.knowledge.learning import advice
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
