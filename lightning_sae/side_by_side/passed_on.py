"""Hooks of Lightning that each member of a run gets as they are."""

from lightning.pytorch import LightningModule
from typing_extensions import override


class PassesOn(LightningModule):
    """A module that passes these hooks on to the members that are left."""

    def pass_on(self, hook: str) -> None:
        """Call a hook of each member."""
        raise NotImplementedError

    @override
    def on_fit_start(self) -> None:
        self.pass_on("on_fit_start")

    @override
    def on_fit_end(self) -> None:
        self.pass_on("on_fit_end")

    @override
    def on_train_end(self) -> None:
        self.pass_on("on_train_end")

    @override
    def on_train_epoch_start(self) -> None:
        self.pass_on("on_train_epoch_start")

    @override
    def on_train_epoch_end(self) -> None:
        self.pass_on("on_train_epoch_end")

    @override
    def on_validation_start(self) -> None:
        self.pass_on("on_validation_start")

    @override
    def on_validation_epoch_start(self) -> None:
        self.pass_on("on_validation_epoch_start")

    @override
    def on_validation_end(self) -> None:
        self.pass_on("on_validation_end")

    @override
    def on_test_start(self) -> None:
        self.pass_on("on_test_start")

    @override
    def on_test_epoch_start(self) -> None:
        self.pass_on("on_test_epoch_start")

    @override
    def on_test_end(self) -> None:
        self.pass_on("on_test_end")

    @override
    def on_predict_start(self) -> None:
        self.pass_on("on_predict_start")

    @override
    def on_predict_epoch_start(self) -> None:
        self.pass_on("on_predict_epoch_start")

    @override
    def on_predict_epoch_end(self) -> None:
        self.pass_on("on_predict_epoch_end")

    @override
    def on_predict_end(self) -> None:
        self.pass_on("on_predict_end")
