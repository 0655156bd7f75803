"""Inspect and edit what a model knows: traces of its table reads, sparse finetuning, HTML pages."""
