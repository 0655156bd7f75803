"""See and change what a model knows: traces of what it reads, finetuning of few rows, pages to look at."""
