"""What 005 adds to factlab: a base that knows text and facts, ways to teach it more, and what is measured after."""
