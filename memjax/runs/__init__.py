"""The folder of a run: its layout, how it is written and how it is loaded."""
