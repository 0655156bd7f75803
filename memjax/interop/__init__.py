"""Converts models from and to other formats, and dense models to memory models."""
