"""Messages about the text of a run, in Lightning's log."""

import logging
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("lightning.pytorch")

OFTEN = 3
"""Number of passes over the text above which a warning is logged."""


def activations_asked_for(trainer: Trainer | None, batch_size: int) -> float | None:
    """Activations that a rank trains on; None if `max_steps` does not determine it."""
    settings: Any = trainer
    if settings is None or settings.max_steps <= 0 or settings.overfit_batches:
        return None
    return settings.max_steps * settings.accumulate_grad_batches * batch_size


def unknown_token(tokenizer: Any) -> int | None:
    """The tokenizer's token for unknown characters; None without one.

    Also None if the same token is BOS or EOS, because the two uses cannot be told apart.
    """
    unknown = None if tokenizer is None else tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    return unknown


@rank_zero_only
def say_passes(per_pass: float, wanted: float | None, epoch: int) -> bool:
    """Warn if the text is read more than `OFTEN` times.

    Args:
        per_pass: Activations that a pass over the text gives this rank.
        wanted: Activations that the run needs; None if unknown.
        epoch: Passes so far.

    Returns:
        Whether there was a warning.
    """
    if wanted is None and epoch >= OFTEN:
        log.warning(
            "The text was read %d times and is read again: a pass over it gives about %s "
            "activations. Give more `text`, or stop the run earlier.",
            epoch,
            f"{per_pass:,.0f}",
        )
        return True
    if wanted is not None and wanted > OFTEN * per_pass:
        log.warning(
            "The run reads its text about %.3g times: a pass over it gives about %s activations, "
            "and `max_steps` asks for %s. Give more `text`, or a smaller `max_steps`.",
            wanted / max(per_pass, 1),
            f"{per_pass:,.0f}",
            f"{wanted:,.0f}",
        )
        return True
    return False


@rank_zero_only
def say_short(n: int, found: int, n_ranks: int) -> None:
    """Warn that the held-out text of this rank has fewer tokens than requested."""
    log.warning(
        "The held-out text has %s tokens%s, fewer than the %s asked for: all are read. Give more "
        "`text` or a `validation_text`, raise `validation_fraction`, or ask for fewer "
        "(`n_validation`, `n_test`, `evaluation.n_tokens`).",
        f"{found:,}",
        " for each rank" if n_ranks > 1 else "",
        f"{n:,}",
    )


@rank_zero_only
def say_unknown(unknown: int, tokens: int, part: str) -> None:
    """Warn of the share of tokens for characters that the tokenizer does not know.

    Args:
        unknown: Their number.
        tokens: Tokens read.
        part: `training` or `held-out`.
    """
    log.warning(
        "Of the first %s tokens of the %s text %s (%s %%) stand for characters that the "
        "tokenizer does not know. They are special tokens, left out by `drop_special_tokens`. "
        "Give text in characters of the model's `tokenizer`.",
        f"{tokens:,}",
        part,
        f"{unknown:,}",
        f"{100 * unknown / tokens:.2g}",
    )
