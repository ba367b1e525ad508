"""Unit-norm decoder rows, kept through training."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.checks import expect, refuse, refuse_second, require_one_of
from lightning_sae.distributed.undrawn import without_drawing
from lightning_sae.training.optimizer import AfterOptimizerSteps


class DecoderNormProjection(AfterOptimizerSteps):
    """Keep the rows of `W_dec` at norm 1: project the gradient, renormalise after each step.

    The gradient's component along each row is removed before the optimizer step, so that it does
    not enter Adam's moments. This is not enough: steps along the tangent, which Adam also rescales,
    still lengthen the rows. So the rows are normalised again after the step. Both happen once per
    optimizer step, not per micro-batch, and not for steps that a gradient scaler skips.

    Source: Bricken et al., Towards Monosemanticity (2023), "Advice for training sparse
    autoencoders".

    Example::

        trainer = Trainer(callbacks=DecoderNormProjection())
        trainer.fit(ReLUSAE(d_in=512, d_sae=8192), data)

    Raises:
        ValueError: When fitting starts, if the module has no `W_dec` and `decoder_norm`, or its
            `decoder_norm` is `free`, or if the trainer has this callback twice.
    """

    # A callback of another class with this attribute takes the place of this one.
    constrains_decoder_norm = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the trainer before data is loaded."""
        if stage != "fit":
            return
        with without_drawing(pl_module):
            _decoder(pl_module)
        if _norm_of(pl_module) == "free":
            raise ValueError(
                "`DecoderNormProjection` keeps decoder rows at norm 1 but the SAE was built with "
                '`decoder_norm="free"`: set `decoder_norm="unit"` or remove the callback.'
            )
        refuse_second(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Normalise the rows now and after every optimizer step."""
        w = _decoder(pl_module)
        norms = torch.linalg.vector_norm(w.detach(), dim=-1)
        # Rows that are already normalised are not changed, so a resume is exact bit for bit.
        if ((norms - 1).abs() > 8 * torch.finfo(w.dtype).eps).any():
            self.renormalise(w)
        self.after_each_step(trainer, w, lambda: self.renormalise(w))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove the gradient's component along each row, after unscaling and before clipping."""
        w = _decoder(pl_module)
        if w.grad is not None:
            self.project(w.grad, w)

    # In place, because a temporary copy of the decoder costs more time than Adam's step.

    @torch.no_grad()
    def project(self, gradient: Tensor, w: Tensor) -> None:
        """Remove from `gradient` [d_sae, d_in] its component along the unit rows `w`, in place."""
        for g, rows in zip(gradient.split(1024), w.split(1024), strict=True):  # stays in cache
            g.addcmul_(rows, (g * rows).sum(-1, keepdim=True), value=-1)

    @torch.no_grad()
    def renormalise(self, w: Tensor) -> None:
        """Scale the rows of `w` [d_sae, d_in] in place to norm 1; rows of zeros stay zero."""
        w.div_(torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_min(1e-12))


def keep_unit_rows(optimizer: Optimizer, w: Tensor) -> None:
    """Do in each optimizer step what `DecoderNormProjection` does, without a trainer."""
    projection = DecoderNormProjection()

    def before_step(*_: object) -> None:
        if w.grad is not None:
            projection.project(w.grad, w)

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(lambda *_: projection.renormalise(w))


def require_init_norm(decoder_init_norm: float, decoder_norm: str) -> None:
    """Raise a ValueError if rows cannot start at this norm."""
    require_one_of(("unit", "free"), decoder_norm=decoder_norm)
    expected = "a positive, finite number"
    expect(0 < decoder_init_norm < math.inf, "decoder_init_norm", expected, decoder_init_norm)
    if decoder_norm == "unit" and decoder_init_norm != 1:
        refuse(
            'Expected argument `decoder_init_norm` to be 1 with `decoder_norm="unit"`, which '
            f"rescales rows to norm 1 before the first step, but got {decoder_init_norm!r}: set "
            '`decoder_norm="free"` too, or leave it out.'
        )


def _decoder(pl_module: LightningModule) -> Tensor:
    # Not by a protocol, which does not see parameters from Python 3.12 on.
    if not isinstance(w := getattr(pl_module, "W_dec", None), Tensor) or not _norm_of(pl_module):
        raise ValueError(
            "Expected a module with a decoder `W_dec` [d_sae, d_in] and its `decoder_norm` but "
            f"{type(pl_module).__name__} has none: train an SAE or remove the callback."
        )
    return w


def _norm_of(pl_module: LightningModule) -> str | None:
    return getattr(pl_module, "decoder_norm", None)
