"""Training of the SAEs of the study of rare latents."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.files import write_atomically
from lightning_sae.functional.penalties import Sqrt, describe
from lightning_sae.studies.rare_latents.settings import ARGUMENTS, WINDOW, Variant
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.snapshots import FrequencySnapshots, frequencies_path
from lightning_sae.studies.shared.training import train_together


class InitialSum(Callback):
    """Writes the sum of the decoder rows before the first step.

    Args:
        path: The file, `.safetensors`; kept if it is there, so that a resumed run does not change
            it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, in a new run."""
        assert isinstance(pl_module, SparseAutoencoder)
        if not self.path.is_file():
            state = {"sum": pl_module.W_dec.detach().sum(0).cpu()}
            write_atomically(self.path, lambda temporary: save_file(state, temporary))


def initial_sum(folder: Path, name: str) -> Float[Tensor, " d_in"]:
    """What `InitialSum` wrote for an SAE."""
    return load_file(_initial_path(folder, name))["sum"]


def _initial_path(folder: Path, name: str) -> Path:
    return folder / "initial" / f"{name}.safetensors"


def train(
    setting: Setting, folder: Path, found: Sequence[Variant], seed: int
) -> dict[str, SparseAutoencoder]:
    """Train all SAEs of a seed; those of one length on one pass of the language model."""
    saes: dict[str, SparseAutoencoder] = {}
    for length in dict.fromkeys(variant.length for variant in found):
        longer = copy(setting)
        longer.steps = max(1, round(length * setting.steps))
        members = [
            _member(setting if not each.slow else longer, longer, folder, each)
            for each in found
            if each.length == length
        ]
        saes |= train_together(longer, folder / f"x{length:g}", members, seed=seed)
    return saes


def _member(warming: Setting, setting: Setting, folder: Path, variant: Variant) -> dict[str, Any]:
    """The description of an SAE; its warm-ups are as long as in the setting `warming`."""
    arguments = {**ARGUMENTS[variant.origin], "d_sae": variant.d_sae}
    arguments["lr_warmup_steps"] = warming.arguments()["lr_warmup_steps"]
    if variant.sqrt:
        arguments["penalty"] = describe(Sqrt())
    family = Family(variant.name, "", "lightning_sae.ReLUSAE", (variant.coefficient,), arguments)
    member = family.member(setting, variant.name, variant.coefficient, setting.lr)
    member["callbacks"][0]["init_args"]["n_steps"] = max(1, warming.share(0.1))
    window = max(1, setting.share(WINDOW))
    member["callbacks"] += [
        FrequencySnapshots(frequencies_path(folder, variant.name), window),
        InitialSum(_initial_path(folder, variant.name)),
    ]
    return {**member, "hook_name": variant.hook_name}
