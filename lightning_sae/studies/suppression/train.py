"""The stages of the study of suppression: SAEs, their fine-tuned copies, and their figures."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sae.architectures import RescaledSAE, SparseAutoencoder
from lightning_sae.architectures.portable import CONFIG
from lightning_sae.architectures.rescaled import TRAINED
from lightning_sae.callbacks import DecoderNormProjection, L1Warmup
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.data.scaling import Scaling
from lightning_sae.loading import load
from lightning_sae.studies.shared.evaluation import evaluate
from lightning_sae.studies.shared.folder import write_json
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together
from lightning_sae.studies.suppression.latents import latent_rows

BASELINE = "baseline"
METHODS = (BASELINE, *TRAINED)
ORIGINAL = "original"
ENCODER_IS_FROZEN = tuple(
    name for name, weights in TRAINED.items() if not {"W_enc", "b_enc"} & {*weights}
)

SAEs = dict[str, SparseAutoencoder]
Row = dict[str, Any]


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


def measured(
    setting: Setting,
    folder: Path,
    originals: Mapping[str, SparseAutoencoder],
    steps: int,
    seed: int,
) -> dict[str, list[Row]]:
    """Fine-tune copies by all methods, and measure them and the originals.

    Returns:
        `methods`, a row for each hook and method; `latents`, a row for each hook and latent.
    """
    starts, copies = fine_tuned(
        setting, folder / "fine-tuned", originals, steps, seed, setting.data(seed)
    )
    data = setting.held_out()
    rows: dict[str, list[Row]] = {"methods": [], "latents": []}
    for hook in setting.hook_names:
        at_hook = data.at(hook)
        saes = {ORIGINAL: starts[hook], **{name: copies[f"{hook}-{name}"] for name in METHODS}}
        figures = evaluate(
            saes, at_hook, setting.held_out_tokens, folder / "figures" / f"{hook}.json"
        )
        fires = _firings(
            saes, at_hook, setting.held_out_tokens, folder / "firings" / f"{hook}.json"
        )
        common = {"seed": seed, "hook": hook}
        rows["methods"] += [
            {
                **common,
                "method": name,
                **_scalars(own, saes[name]),
                "differing": fires["differing"].get(name),
            }
            for name, own in with_recovered(figures).items()
        ]
        rows["latents"] += [{**common, **row} for row in latent_rows(saes, fires)]
    return rows


def fine_tuned(
    setting: Setting,
    folder: Path,
    originals: Mapping[str, SparseAutoencoder],
    steps: int,
    seed: int,
    data: ActivationDataModule,
) -> tuple[SAEs, SAEs]:
    """The SAEs that fine-tuning begins with by hook, and the copies by hook and method.

    The former are the originals, with scales of one and through the same scaling of inputs and back
    as the copies, so that weights which are not trained are the same to the last bit.
    """
    starts = {hook: copy.deepcopy(sae).cpu() for hook, sae in originals.items()}
    kept = folder / "scalings.json"
    if not kept.is_file():
        found = _scalings(data)
        plain = {hook: [s.mean.tolist(), s.scale.tolist()] for hook, s in found.items()}
        write_json(kept, plain)
    for hook, numbers in json.loads(kept.read_text()).items():
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
        if not (folders[hook] / CONFIG).is_file():  # which is written last
            shutil.rmtree(folders[hook], ignore_errors=True)
            RescaledSAE.of(start).save_pretrained(folders[hook])
    return {hook: load(path) for hook, path in folders.items()}, _all_of(copies, members)


def _scalings(data: ActivationDataModule) -> dict[str, Scaling]:
    """Those of the run that comes, which fills its buffer with the same activations."""
    data.train_dataloader()
    found = data.scalings()
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


def with_recovered(figures: Mapping[str, Row]) -> dict[str, Row]:
    """Figures with the shares of the original's error, and of its perplexity gap, that are gone."""
    original = figures[ORIGINAL]
    gap = original["perplexity_spliced"] - original["perplexity_clean"]
    return {
        name: {
            **own,
            "mse_removed": 1 - own["mse"] / original["mse"],
            "perplexity_recovered": (original["perplexity_spliced"] - own["perplexity_spliced"])
            / gap,
        }
        for name, own in figures.items()
    }


def _scalars(figures: Row, sae: SparseAutoencoder) -> Row:
    own = {name: value for name, value in figures.items() if not isinstance(value, list)}
    return {**own, "dead": round(figures["dead_fraction"] * sae.d_sae), "d_sae": sae.d_sae}


@torch.no_grad()
def _firings(saes: SAEs, data: ActivationDataModule, n_tokens: int, kept: Path) -> dict[str, Any]:
    """How often and how strongly each latent of the original fires, and which copies differ.

    Returns:
        `n_tokens`; `frequency` and mean `strength` of firings of each latent; `differing`, by
        method with a frozen encoder, on how many tokens another set of latents fires.
    """
    if not kept.is_file():
        original = saes[ORIGINAL]
        for sae in saes.values():
            sae.to(data.language_model.device)
        counts = torch.zeros(original.d_sae, dtype=torch.float64)
        sums, n = torch.zeros_like(counts), 0
        differing = dict.fromkeys(ENCODER_IS_FROZEN, 0)
        for x in HeldOutBatches(data, n_tokens):
            f = original.encode(x)
            fires = f > 0
            n += len(x)
            counts += fires.sum(0).cpu()
            sums += f.double().sum(0).cpu()
            for name in differing:
                differing[name] += int((_fires(saes[name], x) != fires).any(-1).sum())
        strength = sums / counts.clamp_min(1)
        frequency = counts / max(1, n)
        found = {"n_tokens": n, "frequency": frequency.tolist(), "strength": strength.tolist()}
        write_json(kept, {**found, "differing": differing})
    return dict(json.loads(kept.read_text()))


def _fires(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return sae.encode(x) != 0
