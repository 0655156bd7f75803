"""Checkpoints: steps written atomically in the background by Orbax, and verified when they are read.

A step is a folder of items. An item of arrays is stored under nested names, one array per leaf; a leaf larger than a
block is stored as row blocks, `name/rows_<first row>`, so that reading and writing need memory for only one block
besides the leaf. A document is one JSON file. The item `digests` is the index of the others: shape, dtype and digest of
every leaf, digest of every document, the loss, and whether the step is partial, that is, saved without its large items.
All items of a step are committed by one rename.

Orbax (0.12) silently restores flipped bits, hence the digests.

Other packages use `checkpoints`, which builds on `steps` (the steps on disk), `saving`, `restoring`, `index`,
`digests`, `blocks` and `stored_arrays`.
"""

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.checkpoint.restoring import Restored
from memjax.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpoints", "Restored"]
