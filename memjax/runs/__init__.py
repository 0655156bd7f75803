"""The folder of a run: layout, writing and loading."""
