"""The web pages of an analysis, opened from disk."""
