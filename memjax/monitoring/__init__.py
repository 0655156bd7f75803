"""What can be seen of a run: metrics, progress, profiles, plots."""
