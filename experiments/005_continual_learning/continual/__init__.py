"""Code of experiment 005, beyond factlab: facts to teach, methods of teaching, and measures of what is forgotten."""
