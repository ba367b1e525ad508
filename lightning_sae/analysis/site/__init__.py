"""The pages of an analysis, which open from the disk."""
