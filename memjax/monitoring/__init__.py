"""Monitoring of runs: metrics, progress, profiles, plots."""
