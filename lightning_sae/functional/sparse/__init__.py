"""Sparse codes: one dense product with the dictionary per step; the rest on active latents only."""
