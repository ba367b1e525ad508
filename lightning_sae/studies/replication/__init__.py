"""The study of replication: SAEs on MLP activations, dead latents and rare ones."""
