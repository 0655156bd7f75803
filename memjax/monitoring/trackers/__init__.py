"""Trackers receive metrics besides metrics.jsonl; they can neither stop nor slow a run."""
