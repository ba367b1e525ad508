"""Losses that give dead latents a gradient; neither affects alive latents.

Both let dead latents reconstruct the alive latents' error, which is detached, without a decoder
bias. Both are relative to the error of the whole batch. With several ranks, each with a part of the
batch, `mean_of_ranks` computes the mean of a tensor over ranks, and the loss is the mean of the
returned values. With a split dictionary, each device gives its own dead latents, possibly none, and
all get the same value.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.functional.sparse.selection import chosen_among

Mean = Callable[[Tensor], Tensor]


def _alone(value: Tensor) -> Tensor:
    return value


def variance(x: Float[Tensor, "batch d_in"], mean_of_ranks: Mean = _alone) -> Float[Tensor, ""]:
    """Mean squared distance from the mean of a batch, summed over d_in.

    Example:
        >>> variance(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        tensor(5.)
    """
    return mean_of_ranks((x - mean_of_ranks(x.mean(0))).pow(2).sum(-1).mean())


def auxk(
    residual: Float[Tensor, "batch d_in"],
    pre: Float[Tensor, "batch dead"],
    W_dec: Float[Tensor, "dead d_in"],
    k: int,
    mean_of_ranks: Mean = _alone,
    parts: Parts = ALONE,
) -> Float[Tensor, ""]:
    r"""Share of the error's variance unexplained by the k strongest dead latents of each row.

    .. math:: \sum \|e - \hat e\|^2 \,/\, \sum \|e - \bar e\|^2, \quad
              \hat e = \mathrm{TopK}(v_{dead}, k) W_{dec,dead}

    Source: Gao et al., Scaling and evaluating sparse autoencoders (2024), appendix A.2. Their code
    and dictionary_learning apply a ReLU, so that a latent whose pre-activations are all negative,
    as those of every dead latent of a ReLU SAE are, gets no gradient. SAELens uses negative
    pre-activations as they are. So does this function, with a floor of minus the length of the
    row's error, which bounds the loss for any bias. The gradient ignores the floor.

    A bias far below zero hardly moves, because an Adam step is about as large as the learning rate.
    Of 24 latents of a TopK SAE on toy data with `b_enc` of -20, none fired again within 400 steps
    at `lr=1e-3` (with -5 none either); at `lr=1e-2` 21 did, although their biases were still -18
    on average, and none without AuxK. `DeadFeatureResampling` resets biases: with `reinitialize`
    all 24 fired again at `lr=1e-3`, with `loss_squared`, whose encoder rows are small
    (`encoder_scale`), none did.

    Args:
        residual: The error e, detached.
        pre: Pre-activations v of the dead latents.
        W_dec: Their decoder rows.
        k: Dead latents used per row; all if there are fewer.
        mean_of_ranks: See the top of the file.
        parts: The devices that each have some of the dead latents.

    Returns:
        A dimensionless scalar; 0 for a residual that does not vary, such as a single row.
    """
    values, latents = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    kept = chosen_among(values.detach(), k, parts)
    # Straight through: the value has a floor, the gradient is that of the pre-activation.
    floor = -residual.norm(dim=-1, keepdim=True)
    values = values + (values.maximum(floor) - values).detach()
    if parts.n > 1:
        values = values * kept
    chosen = torch.zeros_like(pre).scatter(-1, latents, values)
    centred = residual - mean_of_ranks(residual.mean(0))
    spread, size = mean_of_ranks(torch.stack([centred.pow(2).sum(), residual.pow(2).sum()]))
    error = (residual - parts.sum(chosen @ W_dec)).pow(2).sum()
    limits = torch.finfo(spread.dtype)
    varies = spread > limits.eps * size
    return torch.where(varies, error / spread.clamp_min(limits.tiny), 0.0)


def ghost_gradients(
    residual: Float[Tensor, "batch d_in"],
    pre: Float[Tensor, "batch dead"],
    W_dec: Float[Tensor, "dead d_in"],
    mean_of_ranks: Mean = _alone,
    parts: Parts = ALONE,
) -> Float[Tensor, ""]:
    r"""Squared error of a reconstructed residual, scaled to the size of the squared error itself.

    .. math:: c \, \tfrac{1}{B} \sum_i \|e_i - s_i\, g_i\|^2, \quad
              g_i = \exp(v_{dead,i}) W_{dec,dead}, \quad s_i = \|e_i\| / (2 \|g_i\|)

    with s and c constants to the gradient; c makes the value that of the mean squared error.
    Source: Jermyn and Templeton, Ghost grads, Circuits Updates January 2024.

    Args:
        residual: The error e, detached.
        pre: Pre-activations v of the dead latents.
        W_dec: Their decoder rows.
        mean_of_ranks: See the top of the file.
        parts: The devices that each have some of the dead latents.

    Returns:
        In the units of a squared error summed over d_in, averaged over the batch.
    """
    # The largest pre-activation cancels in s g, and keeps exp finite.
    least = pre.new_full((len(pre), 1), torch.finfo(pre.dtype).min)  # for no dead latents
    largest = parts.most(pre.detach().amax(-1, keepdim=True) if pre.shape[1] else least)
    ghost = parts.sum((pre - largest).exp() @ W_dec)
    lengths = ghost.detach().norm(dim=-1, keepdim=True)
    scale = (residual.norm(dim=-1, keepdim=True) / (2 * lengths)).where(lengths > 0, 0.0)
    loss = (residual - scale * ghost).pow(2).sum(-1).mean()
    error, size = mean_of_ranks(torch.stack([residual.pow(2).sum(-1).mean(), loss.detach()]))
    return loss * (error / size.clamp_min(torch.finfo(loss.dtype).tiny))
