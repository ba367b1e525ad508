"""Many SAEs in one run, each as if it were alone."""

from lightning_sae.side_by_side.module import SideBySide as SideBySide

__all__ = ["SideBySide"]
