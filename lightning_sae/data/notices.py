"""What a run says about its text without being asked, as lines of Lightning's log."""

import logging
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("lightning.pytorch")

OFTEN = 3
"""Passes over the text above which a run says so."""


def activations_asked_for(trainer: Trainer | None, batch_size: int) -> float | None:
    """Activations that a rank trains on; None where no number of steps says so."""
    settings: Any = trainer
    if settings is None or settings.max_steps <= 0 or settings.overfit_batches:
        return None
    return settings.max_steps * settings.accumulate_grad_batches * batch_size


def unknown_token(tokenizer: Any) -> int | None:
    """The token that stands for characters the tokenizer does not know, if it has one of its own.

    Where the same token begins or ends documents, the two uses cannot be told apart.
    """
    unknown = None if tokenizer is None else tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    return unknown


@rank_zero_only
def say_passes(per_pass: float, wanted: float | None, epoch: int) -> bool:
    """Say that the text is read more than `OFTEN` times, if so.

    Args:
        per_pass: Activations that a pass over the text gives this rank.
        wanted: Activations that the run asks for; None if unknown.
        epoch: Passes done.

    Returns:
        Whether it was said.
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
    """Say that the held-out text of this rank has fewer tokens than were asked for."""
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
    """Say which share of the tokens stand for characters that the tokenizer does not know.

    Args:
        unknown: How many do.
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
