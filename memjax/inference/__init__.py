"""Text from a model: the compiled prefill and decode, sampling, and prompts in, texts out."""
