"""Code shared by studies: settings, sweeps, tuning, frontiers, pages and plots."""
