"""Inference: compiled prefill and decode, sampling, scoring, streaming, and an OpenAI-compatible server."""
