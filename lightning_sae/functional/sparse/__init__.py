"""Sparse codes: one product with the whole dictionary per step, then the active latents alone."""
