"""Models from elsewhere: other checkpoints, and dense models that become memory models."""
