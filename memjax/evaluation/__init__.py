"""Evaluation of trained models: bits per byte of text, recall of facts, questions, tasks."""
