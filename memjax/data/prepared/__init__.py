"""Corpora that were tokenised before the training."""
