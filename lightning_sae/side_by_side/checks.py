"""Checks of a run of several SAEs before it starts."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

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
    if any(isinstance(each, LearningRateFinder) for each in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "`LearningRateFinder` finds one learning rate but SAEs side by side have one each: "
            "use `sweep` with several values of `lr`."
        )


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
