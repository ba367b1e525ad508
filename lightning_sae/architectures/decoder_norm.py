"""Unit-norm decoder rows, kept through training."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_sae.checks import refuse_second


class DecoderNormProjection(Callback):
    """Keep the rows of `W_dec` at norm 1: project the gradient, renormalise after each step.

    The component of the gradient along each row is removed before the optimiser sees it, so that
    Adam's moments hold no motion that is undone at once. That alone is not enough: a step along
    the sphere's tangent, and Adam's rescaling of it, still lengthen the rows. So their norm is
    reset after the step. Both happen once per step of the optimiser, not per micro-batch, and not
    for steps that a gradient scaler skips.

    Source: Bricken et al., Towards Monosemanticity (2023), "Advice for training sparse
    autoencoders".

    Example::

        trainer = Trainer(callbacks=DecoderNormProjection())
        trainer.fit(ReLUSAE(d_in=512, d_sae=8192), data)

    Raises:
        ValueError: When fitting starts, if the module has no `W_dec` or says
            `decoder_norm="free"`, or if the trainer has this callback twice.
    """

    constrains_decoder_norm = True

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any data is touched."""
        if stage != "fit":
            return
        _decoder(pl_module)
        if getattr(pl_module, "decoder_norm", "unit") == "free":
            raise ValueError(
                "`DecoderNormProjection` keeps decoder rows at norm 1 but the SAE was built with "
                '`decoder_norm="free"`: set `decoder_norm="unit"` or remove the callback.'
            )
        refuse_second(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from unit rows, and renormalise at the end of every step of the optimiser."""
        w = _decoder(pl_module)
        norms = torch.linalg.vector_norm(w.detach(), dim=-1)
        # Rows that an earlier step normalised stay bit for bit, so that a resumed run is exact.
        if ((norms - 1).abs() > 8 * torch.finfo(w.dtype).eps).any():
            self.renormalise(w)

        def after_step(*_: object) -> None:
            self.renormalise(w)

        # A hook of the optimiser itself: Lightning has none between a step and what follows it.
        self._handles = [
            optimizer.register_step_post_hook(after_step)
            for optimizer in trainer.optimizers
            if any(
                parameter is w for group in optimizer.param_groups for parameter in group["params"]
            )
        ]

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove from each row's gradient the part along the row: unscaled, and before clipping."""
        w = _decoder(pl_module)
        if w.grad is not None:
            self.project(w.grad, w)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimiser."""
        self._remove_hooks()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimiser."""
        self._remove_hooks()

    # In place: a temporary of the decoder's size costs more than the step of Adam itself.

    @torch.no_grad()
    def project(self, gradient: Tensor, w: Tensor) -> None:
        """Remove in place from `gradient` [d_sae, d_in] what is parallel to the unit rows `w`."""
        for g, rows in zip(gradient.split(1024), w.split(1024), strict=True):  # stays in cache
            g.addcmul_(rows, (g * rows).sum(-1, keepdim=True), value=-1)

    @torch.no_grad()
    def renormalise(self, w: Tensor) -> None:
        """Scale the rows of `w` [d_sae, d_in] in place to norm 1; rows of zeros stay zero."""
        w.div_(torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_min(1e-12))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def keep_unit_rows(optimizer: Optimizer, w: Tensor) -> None:
    """Have each step of an optimizer do what `DecoderNormProjection` does, without a trainer."""
    projection = DecoderNormProjection()

    def before_step(*_: object) -> None:
        if w.grad is not None:
            projection.project(w.grad, w)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(lambda *_: projection.renormalise(w))


def _decoder(pl_module: LightningModule) -> Tensor:
    w = getattr(pl_module, "W_dec", None)
    if not isinstance(w, Tensor):
        raise ValueError(
            "Expected a module with a decoder `W_dec` [d_sae, d_in] but "
            f"{type(pl_module).__name__} has none: train an SAE or remove the callback."
        )
    return w
