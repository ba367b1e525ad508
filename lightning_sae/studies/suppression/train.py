"""Training of the SAEs of the study of suppression, and fine-tuning of their copies."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_sae.architectures import RescaledSAE, SparseAutoencoder
from lightning_sae.architectures.portable import CONFIG
from lightning_sae.architectures.rescaled import TRAINED
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup
from lightning_sae.data import ActivationDataModule
from lightning_sae.loading import load
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together

BASELINE = "baseline"
METHODS = (BASELINE, *TRAINED)
ORIGINAL = "original"
ENCODER_IS_FROZEN = tuple(
    name for name, weights in TRAINED.items() if not {"W_enc", "b_enc"} & {*weights}
)

SAEs = dict[str, SparseAutoencoder]


def given_saes(folders: Sequence[str] | None, setting: Setting) -> SAEs:
    """The SAEs in folders by hook; none if there are no folders.

    Raises:
        ValueError: If they are not one for each hook, or one is not of its hook.
    """
    if not folders:
        return {}
    if len(folders) != len(setting.hook_names):
        raise ValueError(
            f"Expected argument `sae` to be a folder for each of the {len(setting.hook_names)} "
            f"hooks of `hook_name` but got {len(folders)}: give one for each, in their order."
        )
    found: SAEs = {}
    widths = setting.data().d_in
    for hook, folder in zip(setting.hook_names, folders, strict=True):
        sae = found[hook] = load(folder)
        width = widths if isinstance(widths, int) else widths[hook]
        if sae.source.get("hook_name", hook) != hook or sae.d_in != width:
            raise ValueError(
                f"Expected argument `sae` to have an SAE at {hook}, {width} wide, but {folder} is "
                f"one at {sae.source.get('hook_name', hook)}, {sae.d_in} wide: give the folders in "
                "the order of the hooks, and their model."
            )
        RescaledSAE.of(sae)  # raises if it cannot be fine-tuned
    return found


def trained(setting: Setting, folder: Path, l1_coefficient: float, seed: int) -> SAEs:
    """A ReLU SAE at each hook, all on one pass of the language model."""
    arguments = setting.arguments(
        l1_coefficient=l1_coefficient,
        apply_b_dec_to_input=False,  # as in the document
    )
    members = [
        {
            "name": hook,
            "hook_name": hook,
            "sae": {"class_path": "lightning_sae.ReLUSAE", "init_args": arguments},
            "callbacks": [DecoderNormProjection(), L1Warmup(max(1, setting.share(0.1)))],
        }
        for hook in setting.hook_names
    ]
    return _all_of(train_together(setting, folder / "trained", members, seed=seed), members)


def fine_tuned(
    setting: Setting,
    folder: Path,
    originals: Mapping[str, SparseAutoencoder],
    steps: int,
    seed: int,
    data: ActivationDataModule,
) -> tuple[SAEs, SAEs]:
    """The SAEs before fine-tuning by hook, and the fine-tuned copies by hook and method.

    The former are the originals with scales of one. Like the copies they are converted to scaled
    activations and back, so that weights which are not trained are equal bit for bit.
    """
    starts = {hook: copy.deepcopy(sae).cpu() for hook, sae in originals.items()}
    scalings = computed_once(folder / "scalings.json", lambda: _scalings(data))
    for hook, numbers in scalings.items():
        starts[hook].adopt_scaling(*map(torch.tensor, numbers))
    schedule = {
        "lr": setting.lr,
        "lr_warmup_steps": int(0.05 * steps),
        "lr_decay_steps": int(0.25 * steps),
    }
    members = [
        member for hook, start in starts.items() for member in _copies(hook, start, schedule)
    ]
    copies = train_together(setting, folder, members, seed=seed, steps=steps, data=data)
    folders = {hook: folder / "starts" / hook for hook in starts}
    for hook, start in starts.items():
        if not (folders[hook] / CONFIG).is_file():  # the last file written
            shutil.rmtree(folders[hook], ignore_errors=True)
            RescaledSAE.of(start).save_pretrained(folders[hook])
    return {hook: load(path) for hook, path in folders.items()}, _all_of(copies, members)


def _scalings(data: ActivationDataModule) -> dict[str, list[Any]]:
    """Mean and scale by hook, as in the run to come, whose buffer begins with the same text."""
    data.train_dataloader()
    found = {hook: [s.mean.tolist(), s.scale.tolist()] for hook, s in data.scalings().items()}
    data.teardown("fit")
    return found


def _copies(hook: str, start: SparseAutoencoder, schedule: dict[str, Any]) -> list[dict[str, Any]]:
    saes = {BASELINE: trained_on(start, **schedule)}
    saes |= {name: RescaledSAE.of(start, name, **schedule) for name in TRAINED}  # type: ignore[arg-type]
    return [
        {
            "name": f"{hook}-{name}",
            "hook_name": hook,
            "sae": sae,
            "callbacks": [DecoderNormProjection()] if sae.decoder_norm == "unit" else [],
        }
        for name, sae in saes.items()
    ]


def trained_on(sae: SparseAutoencoder, **arguments: Any) -> SparseAutoencoder:
    """A copy of a trained SAE with other arguments."""
    own = {name: value for name, value in sae.hparams.items() if not name.startswith("_")}
    found = type(sae)(**{**own, **arguments})
    found.load_state_dict(sae.state_dict())
    found.source, found.is_trained = dict(sae.source), True
    return found


def _all_of(saes: SAEs, members: Sequence[Mapping[str, Any]]) -> SAEs:
    lost = [member["name"] for member in members if member["name"] not in saes]
    if lost:
        raise ValueError(
            f"The losses of {', '.join(lost)} did not stay finite: lower `lr`, and give another "
            "`output`."
        )
    return saes
