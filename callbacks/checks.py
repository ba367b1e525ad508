"""What several callbacks refuse."""

from lightning.pytorch import Callback, Trainer


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError if the trainer has another callback of the kind of `callback`."""
    kind = type(callback)
    if sum(isinstance(other, kind) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected one `{kind.__name__}` but the trainer has several: remove all but one."
        )


def expect(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError about the argument `name` unless `holds`."""
    if not holds:
        raise ValueError(f"Expected argument `{name}` to be {expected} but got {value}.")
