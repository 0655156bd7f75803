"""Patches: rows of tables that replace others, in files, applied to runs, merged."""
