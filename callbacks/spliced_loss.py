"""What the reconstruction costs the language model, while the SAE is trained."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sae.analysis import evaluate_in_model
from lightning_sae.checks import expect
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.source import source_of


class SplicedLossMonitor(Callback):
    """Logs, at each validation, the language model's loss with the reconstruction spliced in.

    On the same first held-out tokens each time: `val/ce_clean`, `val/ce_spliced`,
    `val/ce_zero_ablation`, `val/ce_mean_ablation`, `val/loss_recovered_zero`,
    `val/loss_recovered_mean`, `val/kl` and so on, the names that a test gives them as `test/...`;
    see `lightning_sae.analysis.evaluate_in_model`. Ablations are run at the first validation alone.
    Needs an `ActivationDataModule`; with other data nothing is logged. It draws no random numbers
    and reads no training text, so weights are those of a run without it.

    Args:
        n_tokens: Held-out tokens that the language model reads, about, on all ranks together, and
            at most those of a validation; 0 for none.

    Attributes:
        known: Figures of this text by hook, for those that no SAE changes. Callbacks of several
            SAEs may share it, and then run the ablations once.
        seconds: Time that it has taken.

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
            # The same on all ranks already, as Lightning cannot see.
            pl_module.log_dict(figures, sync_dist=True)
            self.seconds += time.perf_counter() - began

    def _evaluate(self, pl_module: LightningModule, data: ActivationDataModule) -> dict[str, float]:
        hook, n = data.hook_names[0], min(self.n_tokens, data.n_validation * data.n_ranks)
        known = self.known.get(hook)
        found = evaluate_in_model(pl_module, data, n, known)  # type: ignore[arg-type]
        self.known.setdefault(hook, found)
        return {f"val/{name}": float(value) for name, value in found.items()}
