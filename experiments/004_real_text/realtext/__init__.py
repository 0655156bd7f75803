"""What 004 adds to factlab: articles as tokens, questions about them, trainings on text."""
