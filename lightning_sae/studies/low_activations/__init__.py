"""The study of low activations: what does it cost to remove them?"""
