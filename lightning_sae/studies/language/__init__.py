"""Experiments on the activations of a language model."""
