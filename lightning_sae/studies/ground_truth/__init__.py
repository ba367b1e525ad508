"""The study of ground truth: a league table of the architectures on known features."""
