"""Other libraries' formats: one module per format, which reads and writes it.

An imported file becomes an SAE of this package with the latents of its own library. An exported SAE
acts on raw activations, with the latents of this package. Both record the units of the latents.
"""

from lightning_sae.interop.formats import FORMATS, export, is_ours, read, recognised

__all__ = ["FORMATS", "export", "is_ours", "read", "recognised"]
