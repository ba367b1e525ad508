"""Other libraries' files: each format is one file here, that reads and writes it.

What comes in is an SAE of this package, with the latents that its own library gives. What goes out
acts on raw activations, with the latents that this package gives. Both say in which units it is.
"""

from lightning_sae.interop.formats import FORMATS, export, is_ours, read, recognised

__all__ = ["FORMATS", "export", "is_ours", "read", "recognised"]
