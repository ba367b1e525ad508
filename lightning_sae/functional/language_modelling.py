r"""The loss of a language model when a reconstruction replaces one of its activations.

Logits at position :math:`t` predict the token at :math:`t + 1`, the target. One rule says which
predictions count, everywhere: with a mask of the tokens' shape, **the prediction at position t is
counted if the mask is true at its target, t + 1**. The first token is no target, so `mask[:, 0]`
has no effect, and the last position predicts nothing and is never counted. Without a mask all
`seq - 1` predictions of each row count. Cross-entropies and divergences are in nats.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Scalars = float | Float[Tensor, "..."]


def next_token_cross_entropy(
    logits: Float[Tensor, "batch seq vocab"],
    tokens: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    r"""Cross-entropy of the next token: its sum over the counted predictions, and their number.

    .. math:: \sum_{b,t} m_{b,t+1} \, (-\log p_{b,t}(\text{token}_{b,t+1})), \qquad
        \sum_{b,t} m_{b,t+1}

    with :math:`p_{b,t}` the softmax of the logits and :math:`m` the mask. Add both over batches
    and divide: nats per token.

    Args:
        logits: Output of the language model, shape `[batch, seq, vocab]`.
        tokens: Its input, shape `[batch, seq]`.
        mask: True for the tokens that count as targets; all of them if None.

    Returns:
        The sum in nats, float64, and the count, int64.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 8)
        >>> next_token_cross_entropy(logits, torch.tensor([[0, 5, 0, 3]]))
        (tensor(6.2383, dtype=torch.float64), tensor(3))
        >>> bos = 0
        >>> tokens = torch.tensor([[0, 5, 0, 3]])
        >>> next_token_cross_entropy(logits, tokens, mask=tokens != bos)
        (tensor(4.1589, dtype=torch.float64), tensor(2))
    """
    _check_shape("tokens", tokens, logits.shape[:-1], "the logits")
    keep = _counted_predictions(logits, mask)
    nats = [
        cross_entropies(log_probabilities(logits[rows]), tokens[:, 1:][rows])
        for rows in _in_chunks(keep, logits.shape[-1])
    ]
    return torch.cat(nats).sum(dtype=torch.float64), keep.sum()


def kl_divergence(
    clean_logits: Float[Tensor, "batch seq vocab"],
    spliced_logits: Float[Tensor, "batch seq vocab"],
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    r"""Divergence of the spliced model's predictions from the clean model's: sum and count.

    .. math:: \sum_{b,t} m_{b,t+1} \sum_v p_{b,t}(v) \log \frac{p_{b,t}(v)}{q_{b,t}(v)}

    with :math:`p` the clean and :math:`q` the spliced softmax. The same predictions count as in
    :func:`next_token_cross_entropy`. Add both over batches and divide: nats per token.

    Args:
        clean_logits: Output of the unchanged language model, shape `[batch, seq, vocab]`.
        spliced_logits: Its output with the reconstruction spliced in, same shape.
        mask: True for the tokens that count as targets; all of them if None.

    Returns:
        The sum in nats, float64, and the count, int64.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> clean = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
        >>> spliced = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()
        >>> kl_divergence(clean, spliced)
        (tensor(0.2231, dtype=torch.float64), tensor(1))
    """
    _check_shape("spliced_logits", spliced_logits, clean_logits.shape, "`clean_logits`")
    keep = _counted_predictions(clean_logits, mask)
    nats = [
        divergences(log_probabilities(clean_logits[rows]), log_probabilities(spliced_logits[rows]))
        for rows in _in_chunks(keep, clean_logits.shape[-1])
    ]
    return torch.cat(nats).sum(dtype=torch.float64), keep.sum()


def log_probabilities(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Logarithms of the softmax, at least in float32: half precision has too few digits for it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def cross_entropies(
    log_p: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Cross-entropy of each prediction in nats."""
    return F.nll_loss(log_p, targets, reduction="none")


def divergences(
    log_p: Float[Tensor, "n vocab"], log_q: Float[Tensor, "n vocab"]
) -> Float[Tensor, " n"]:
    """Divergence of each prediction q from p in nats."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def chunk_size(n: int, vocab: int) -> int:
    """Number of predictions whose logits are computed at a time: a sixteenth, at most 64 MiB.

    Including intermediate results, about five times as much memory is needed.
    """
    return max(1, min(-(-n // 16), 2**24 // vocab))


def _in_chunks(
    keep: Bool[Tensor, "batch predictions"], vocab: int
) -> list[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """Batch and position of the counted predictions in chunks; at least one chunk."""
    rows = keep.nonzero()
    return [tuple(part.T) for part in rows.split(chunk_size(len(rows), vocab))]


def perplexity(cross_entropy: Scalars) -> Float[Tensor, "..."]:
    r"""Perplexity, :math:`\exp(\text{cross-entropy})`.

    Args:
        cross_entropy: Nats per token, averaged over all tokens first.

    Returns:
        A dimensionless number in float64: the number of equally likely tokens with the same
        entropy.

    Example:
        >>> import torch
        >>> perplexity(2.0)
        tensor(7.3891, dtype=torch.float64)
    """
    return _float64(cross_entropy).exp()


def loss_recovered(
    ce_clean: Scalars, ce_spliced: Scalars, ce_ablated: Scalars
) -> Float[Tensor, "..."]:
    r"""Share of an ablation's loss increase that the reconstruction recovers.

    .. math:: \frac{\text{CE}_\text{ablated} - \text{CE}_\text{spliced}}
        {\text{CE}_\text{ablated} - \text{CE}_\text{clean}}

    Dimensionless: 1 if the reconstruction is as good as the activation, 0 if as bad as the
    ablation; it may be negative. It depends on the ablation (zero or mean): report both, together
    with the cross-entropies.

    Args:
        ce_clean: Cross-entropy of the unchanged language model, nats per token.
        ce_spliced: The same with the reconstruction spliced in.
        ce_ablated: The same with the activation replaced by zeros, or by the mean activation.

    Returns:
        The share in float64; infinite or NaN if the ablation costs nothing.

    Example:
        >>> import torch
        >>> loss_recovered(ce_clean=3.0, ce_spliced=3.5, ce_ablated=8.0)
        tensor(0.9000, dtype=torch.float64)
    """
    ablated = _float64(ce_ablated)
    return (ablated - _float64(ce_spliced)) / (ablated - _float64(ce_clean))


def _counted_predictions(
    logits: Float[Tensor, "batch seq vocab"], mask: Bool[Tensor, "batch seq"] | None
) -> Bool[Tensor, "batch seq-1"]:
    """Mask of the positions, without the last, whose target counts."""
    if logits.ndim != 3:
        raise ValueError(
            f"Expected logits of shape [batch, seq, vocab], but got {tuple(logits.shape)}: "
            "unsqueeze(0) makes a batch of a single sequence"
        )
    if mask is None:
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    # A mask of integers would be used as indices.
    if mask.dtype != torch.bool:
        raise ValueError(f"Expected `mask` to be boolean, but got {mask.dtype}: pass `mask.bool()`")
    _check_shape("mask", mask, logits.shape[:-1], "the logits")
    return mask[:, 1:]


def _check_shape(name: str, tensor: Tensor, expected: torch.Size, reference: str) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"Expected `{name}` of shape {tuple(expected)} to go with {reference}, but got "
            f"{tuple(tensor.shape)}: pass both for the same batch of tokens"
        )


def _float64(value: Scalars) -> Float[Tensor, "..."]:
    return torch.as_tensor(value, dtype=torch.float64)
