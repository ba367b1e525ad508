"""`python -m lightning_sae` is `lightning-sae`."""

from lightning_sae.cli import command

if __name__ == "__main__":
    command()
