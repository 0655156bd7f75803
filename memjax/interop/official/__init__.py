"""Checkpoints of the official code."""
