"""The language model's loss with the reconstruction spliced in, during training."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.analysis import evaluate_in_model
from lightning_sae.checks import expect
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.source import source_of


class SplicedLossMonitor(Callback):
    """Logs, at each validation, the language model's loss with the reconstruction spliced in.

    The same held-out tokens are used each time. Logged are `val/ce_clean`, `val/ce_spliced`,
    `val/ce_zero_ablation`, `val/ce_mean_ablation`, `val/loss_recovered_zero`,
    `val/loss_recovered_mean`, `val/kl` and so on, with the same names as `test/...` in a test;
    see `lightning_sae.analysis.evaluate_in_model`. Ablations are run only at the first validation.
    Needs an `ActivationDataModule`; with other data nothing is logged. It draws no random numbers
    and reads no training text, so it does not change the weights.

    Args:
        n_tokens: Approximate number of held-out tokens that the language model reads, over all
            ranks; at most those of a validation. 0 turns it off.

    Attributes:
        known: Figures that do not depend on the SAE, by hook. Callbacks of several SAEs may share
            it to run the ablations once.
        seconds: Seconds that it has taken.

    Raises:
        ValueError: If `n_tokens` is negative.
    """

    def __init__(self, n_tokens: int = 8192) -> None:
        expect(n_tokens >= 0, "n_tokens", "at least 0", n_tokens)
        self.n_tokens = n_tokens
        self.known: dict[str, dict[str, float]] = {}
        self.seconds = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the figures of other data."""
        self.known.clear()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = source_of(trainer)
        if self.n_tokens and isinstance(data, ActivationDataModule) and not trainer.sanity_checking:
            began = time.perf_counter()
            figures = self._evaluate(pl_module, data)
            # Already reduced over ranks, which Lightning cannot know.
            pl_module.log_dict(figures, sync_dist=True)
            self.seconds += time.perf_counter() - began

    def _evaluate(self, pl_module: LightningModule, data: ActivationDataModule) -> dict[str, float]:
        hook, n = data.hook_names[0], min(self.n_tokens, data.n_validation * data.n_ranks)
        known = self.known.get(hook)
        found = evaluate_in_model(pl_module, data, n, known)  # type: ignore[arg-type]
        self.known.setdefault(hook, found)
        return {f"val/{name}": float(value) for name, value in found.items()}
