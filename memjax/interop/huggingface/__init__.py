"""Models in the layout of Hugging Face."""
