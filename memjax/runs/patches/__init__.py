"""Patches: files of table rows that replace others; how they are made, applied to runs and merged."""
