"""The embedded language model: small, trained by this package, needs no hub.

`recipe.py` trained it; `model/README.md` is its model card.
"""

from pathlib import Path

from lightning_sae.data.embedded.stdlib import standard_library_documents

__all__ = ["EMBEDDED_MODEL", "HELD_OUT_FRACTION", "standard_library_documents"]

EMBEDDED_MODEL = Path(__file__).parent / "model"
"""Folder of the embedded model and its tokenizer, as `transformers` saves them."""

HELD_OUT_FRACTION = 0.1
"""Files with `held_out(name, HELD_OUT_FRACTION)` were not seen in the training of the model."""
