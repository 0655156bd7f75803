"""Trackers receive metrics in addition to metrics.jsonl; they can neither stop nor slow down a run."""
