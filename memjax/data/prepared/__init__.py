"""Corpora tokenised before training."""
