"""Where metrics go besides metrics.jsonl. None of these can stop or slow a run."""
