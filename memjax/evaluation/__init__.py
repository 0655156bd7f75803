"""What a trained model can do: bits per byte on text, recall of facts, questions, tasks."""
