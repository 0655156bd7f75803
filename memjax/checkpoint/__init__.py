"""Checkpoints: steps written in the background by Orbax, whole or not at all, and verified when they are read.

A step is a folder of items. An item of arrays is stored as nested names, one array per leaf; a leaf larger than a block
is stored as row blocks, `name/rows_<first row>`, so that reading and writing need memory for a block besides the leaf.
A document is one JSON file. The item `digests` indexes the others: shape, dtype and digest of every leaf, digest of
every document, the loss, and whether the step is partial, which is to say that large items were left out on purpose. It
is committed with them, by one rename.

Orbax (0.12) restores flipped bits without a word, hence the digests.

`checkpoints` is what others use; it stands on `steps` (which there are), `saving`, `restoring`, `index` (what a step
says of itself), `digests`, `blocks` and `stored_arrays`.
"""

from memjax.checkpoint.checkpoints import Checkpoints
from memjax.checkpoint.restoring import Restored
from memjax.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpoints", "Restored"]
