"""Commands of `lightning-sae` that have no other place in the package."""
