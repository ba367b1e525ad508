"""Keep latents orthogonal to given directions."""

from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.architectures.base import SparseAutoencoder
from lightning_sae.architectures.decoder_norm import DecoderNormProjection
from lightning_sae.checks import expect, refuse_second
from lightning_sae.training.optimizer import AfterOptimizerSteps


class OrthogonalTo(AfterOptimizerSteps):
    r"""Keep encoder and decoder directions of all latents orthogonal to given ones.

    With an orthonormal basis Q [k, d_in] of their span, each latent's row w and its gradient g
    become

    .. math:: g \leftarrow g - (g\, Q^T) Q \text{ before a step}, \qquad
              w \leftarrow w - (w\, Q^T) Q \text{ after it.}

    The first keeps the removed component out of Adam's moments; the second is needed because Adam
    rescales each coordinate. Both happen once per optimizer step, not per micro-batch, and not for
    steps that a gradient scaler skips. Biases are not changed. Latents that `DeadFeatureResampling`
    replaces are projected with the next step.

    A projection shortens rows, while normalization keeps directions. So this callback must come
    before `DecoderNormProjection`; rows are then orthogonal and of unit norm after each step.

    Source: Neel Nanda's open-source replication of Towards Monosemanticity (2023), where SAEs are
    trained without the direction that ultra-rare latents share.

    Example::

        callbacks = [OrthogonalTo("rare.safetensors"), DecoderNormProjection()]

    Args:
        directions: Directions as rows, [n, d_in] or [d_in], not necessarily orthonormal, in the
            space of the activations; or a .safetensors or `torch.save` .pt file that holds only
            such a tensor.
        encoder: Whether to constrain encoder directions. A tied SAE has one direction for both.
        decoder: Whether to constrain decoder directions.

    Raises:
        ValueError: If the directions cannot be read, are empty or not finite, or if `encoder` and
            `decoder` are both false; when fitting starts, if their width is not `d_in` or they span
            the whole space, if the module is not an SAE, if `DecoderNormProjection` comes first, or
            if the trainer has this callback twice.
    """

    def __init__(
        self, directions: str | Path | Tensor, encoder: bool = True, decoder: bool = True
    ) -> None:
        super().__init__()
        given = directions if isinstance(directions, Tensor) else read_directions(Path(directions))
        self.basis = span(given)
        if not (encoder or decoder):
            raise ValueError(
                "Expected one of `encoder` and `decoder` to be true but got neither: remove the "
                "callback if no latent is to be orthogonal."
            )
        self.encoder, self.decoder = encoder, decoder

    def names(self, sae: SparseAutoencoder) -> list[str]:
        """Names of the constrained parameters."""
        both = (("W_enc", self.encoder), ("W_dec", self.decoder))
        return ["W_dec"] if sae.tied else [name for name, wanted in both if wanted]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the SAE, the directions and the order of callbacks before data is loaded."""
        if stage != "fit":
            return
        if not isinstance(pl_module, SparseAutoencoder):
            raise ValueError(
                f"`OrthogonalTo` needs an SAE, which {type(pl_module).__name__} is not: train one "
                "or remove the callback."
            )
        k, width = self.basis.shape
        expect(width == pl_module.d_in, "directions", f"{pl_module.d_in} wide, as `d_in`", width)
        room = f"of a rank below `d_in`={width}, which leaves nothing"
        expect(k < width, "directions", room, k)
        refuse_second(trainer, self)
        self._require_first(trainer, pl_module)

    def _require_first(self, trainer: Trainer, sae: SparseAutoencoder) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        earlier = callbacks[: callbacks.index(self)]
        behind = any(isinstance(callback, DecoderNormProjection) for callback in earlier)
        if behind and "W_dec" in self.names(sae):
            raise ValueError(
                "Expected `OrthogonalTo` before `DecoderNormProjection`, because a projection "
                "shortens rows of unit norm, but it comes after it: change their order."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project the rows now and after every optimizer step."""
        assert isinstance(pl_module, SparseAutoencoder)
        self.basis = self.basis.to(pl_module.device)
        for name in self.names(pl_module):
            weight = pl_module.get_parameter(name)
            rows = _rows(name, weight.detach())
            # Rows that are already orthogonal are not changed, so a resume is exact bit for bit.
            if not self.holds_for(rows):
                self.project(rows)
            self.after_each_step(trainer, weight, partial(self.project, rows))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove the span of the directions from the gradients, before clipping."""
        assert isinstance(pl_module, SparseAutoencoder)
        for name in self.names(pl_module):
            gradient = pl_module.get_parameter(name).grad
            if gradient is not None:
                self.project(_rows(name, gradient))

    @torch.no_grad()
    def project(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        """Remove the component in the span from rows of a weight or gradient, in place."""
        basis = self.basis.to(rows.dtype)
        rows.addmm_(rows @ basis.T, basis, alpha=-1)

    @torch.no_grad()
    def holds_for(self, rows: Float[Tensor, "d_sae d_in"], tolerance: float = 1e-5) -> bool:
        """Whether the component of each row in the span is at most `tolerance` of its norm."""
        parts = torch.linalg.vector_norm(rows @ self.basis.to(rows.dtype).T, dim=-1)
        return bool((parts <= tolerance * torch.linalg.vector_norm(rows, dim=-1)).all())


def span(directions: Tensor) -> Float[Tensor, "k d_in"]:
    """An orthonormal basis of the span of directions, [n, d_in] or [d_in].

    Raises:
        ValueError: If they are all zero or not finite.

    Example:
        >>> span(torch.tensor([[0.0, 3.0, 0.0], [0.0, -1.0, 0.0]])).abs()
        tensor([[0., 1., 0.]])
    """
    rows = directions.detach().double().reshape(-1, directions.shape[-1] if directions.ndim else 1)
    if directions.ndim not in (1, 2) or not rows.isfinite().all() or not rows.any():
        raise ValueError(
            "Expected argument `directions` to be rows [n, d_in], or one direction [d_in], of "
            f"finite numbers that are not all zero, but got shape {tuple(directions.shape)} "
            f"with {int((rows != 0).sum())} numbers that are not zero and "
            f"{int((~rows.isfinite()).sum())} that are not finite."
        )
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > sizes[0] * max(rows.shape) * torch.finfo(torch.float32).eps).sum())
    return basis[:rank].float()


def read_directions(path: Path) -> Tensor:
    """The only tensor in a .safetensors or .pt file; nothing else is unpickled.

    Raises:
        ValueError: If the file cannot be read or does not hold exactly one tensor.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"Expected argument `directions` to be a .safetensors or .pt file but could not read "
            f"{path}: {error}"
        ) from error
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise ValueError(
            f"Expected argument `directions` to be a file with one tensor but {path} holds "
            f"{len(tensors)} things: save the directions alone."
        )
    return tensors[0]


def _rows(name: str, weight: Tensor) -> Float[Tensor, "d_sae d_in"]:
    return weight.T if name == "W_enc" else weight
