"""How the rows of a table are stored: plain numbers, or codes with scales.

`formats.py` holds the formats and their registry, `triton.py` how kernels read them.
"""
