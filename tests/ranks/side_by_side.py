"""All cases that have the trainer's own settings, side by side in one run."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import SideBySide
from lightning_sae.callbacks import DecoderNormProjection
from tests.ranks.cases import CASES, QUIET, STEPS, build

NAMES = [name for name, case in CASES.items() if not case.flags]
DIVERGES = "diverges"


def members() -> list[dict[str, Any]]:
    """All cases, and one that goes no further than its first steps."""
    found: list[dict[str, Any]] = []
    for name in NAMES:
        case, norm = CASES[name], [DecoderNormProjection()]
        free = case.arguments.get("decoder_norm") == "free"
        callbacks = [*case.callbacks(), *([] if free else norm)]
        found.append({"name": name, "sae": build(case), "callbacks": callbacks})
    wild = build(CASES[NAMES[0]])
    wild.lr = 1e300
    return [*found[:2], {"name": DIVERGES, "sae": wild}, *found[2:]]


def fit_side_by_side(rank: int, batches: Tensor, **flags: Any) -> dict[str, Any]:
    """Members' weights after training, who stopped, and the refusal of unequal members."""
    settings: dict[str, Any] = {**QUIET, **flags, "max_steps": STEPS, "precision": "64-true"}
    loader: DataLoader[Tensor] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    model = SideBySide(members())
    Trainer(**settings).fit(model, loader)
    others = members()[rank:]  # one has a member that the other has not
    refused = ""
    try:
        Trainer(**settings).fit(SideBySide(others), loader)
    except ValueError as error:
        refused = str(error)
    weights = {name: dict(model[name].state_dict()) for name in NAMES}
    return {"weights": weights, "stopped": list(model.stopped), "refused": refused}
