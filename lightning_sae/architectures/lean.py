"""Lightning's bookkeeping, made cheap: a step of a small SAE is shorter than it otherwise is."""

from typing import Any

from lightning.pytorch import LightningModule
from typing_extensions import override


class Lean(LightningModule):
    """A module on which Lightning's own work of a step costs little."""

    @override
    def log(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but does not ask a barebones trainer, which warns at each call."""
        if not getattr(self._trainer, "barebones", False):
            super().log(*args, **kwargs)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's, but quick with Lightning's note of the hook it is in: 40 times a step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
