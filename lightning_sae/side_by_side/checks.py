"""Checks of a run of several SAEs before it starts."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_sae.callbacks import RunCheckpoint, SAEProgressBar, StreamMonitor
from lightning_sae.data.source import ActivationSource
from lightning_sae.side_by_side.member import Member


def require_supported(trainer: Trainer) -> None:
    """Raise a ValueError if members would not train exactly as in separate runs."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            "Expected argument `trainer.strategy` to be `auto` or `ddp` for SAEs side by side but "
            f"got {type(trainer.strategy).__name__}: choose one of these."
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "Expected argument `trainer.precision` to be other than `16-mixed` for SAEs side by "
            "side, because it scales all losses by one number: use `bf16-mixed`."
        )


OF_RUN = RunCheckpoint, SAEProgressBar, StreamMonitor
"""Callbacks of the package that act on a run, and not on an SAE."""


def require_of_run(callback: Callback) -> None:
    """Raise a ValueError for a callback of the run that needs a single SAE."""
    name = type(callback).__name__
    if isinstance(callback, LearningRateFinder):
        raise ValueError(
            "`LearningRateFinder` finds one learning rate but SAEs side by side have one each: "
            "use `sweep` with several values of `lr`."
        )
    if isinstance(callback, LearningRateMonitor):
        raise ValueError(
            "`LearningRateMonitor` logs the learning rates of one optimizer but SAEs side by side "
            "have one each: give each member a `StepMonitor`, which logs `train/lr`."
        )
    ours = type(callback).__module__.startswith(OF_ONE_SAE)
    if ours and not isinstance(callback, OF_RUN):
        raise ValueError(
            f"Expected the trainer's callbacks to act on the whole run but got `{name}`, which "
            "acts on a single SAE: move it to the `callbacks` of each member."
        )


OF_ONE_SAE = "lightning_sae.callbacks.", "lightning_sae.architectures."
"""Modules whose callbacks act on an SAE, except for those in `OF_RUN`."""


def require_hook(member: Member, data: ActivationSource | None) -> None:
    """Raise a ValueError if the data does not have the member's hook."""
    names = () if data is None else data.hook_names
    if not names or member.hook_name in names or (member.hook_name is None and len(names) == 1):
        return
    raise ValueError(
        f"Expected `hook_name` to be one of the data's, {', '.join(names)}, but got "
        f"{member.hook_name}: correct it, or add it to `data.hook_name`."
    )


def require_own_callbacks(member: Member, stage: str) -> None:
    """Raise a ValueError if a callback would act on the whole run and not only its member."""
    for callback in member.callbacks:
        kind = type(callback).__name__
        if stage == "predict" and isinstance(callback, BasePredictionWriter):
            raise ValueError(
                "Expected a member's callbacks to be no `BasePredictionWriter`, whose "
                "`on_predict_batch_end` and `on_predict_epoch_end` take indices and predictions "
                f"from the whole run, but got {kind}: write the latents in `on_predict_batch_end` "
                "of a plain `Callback`."
            )
        if stage == "fit" and isinstance(callback, Checkpoint | EarlyStopping | Timer):
            raise ValueError(
                "Expected a member's callbacks to act on its SAE alone but got "
                f"{kind}, which saves or ends the whole run: move it to `trainer.callbacks`."
            )
