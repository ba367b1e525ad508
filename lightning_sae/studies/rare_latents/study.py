"""The study of rare latents: their share, and where their common direction comes from."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae.checks import require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.studies.rare_latents.measure import measure, over_time, sample, stored
from lightning_sae.studies.rare_latents.report import report
from lightning_sae.studies.rare_latents.settings import Variant, variants
from lightning_sae.studies.rare_latents.train import initial_sum, train
from lightning_sae.studies.shared.folder import computed_once
from lightning_sae.studies.shared.rows import Row, without_nan
from lightning_sae.studies.shared.seeds import run_seeds
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.snapshots import frequencies_path, read_snapshots


def rare_latents(
    l1_coefficients: Sequence[float] = (4.0, 2.0),
    widths: Sequence[float] = (2.0, 4.0, 8.0, 16.0),
    expansion: float = 8.0,
    length: float = 10.0,
    counted_tokens: int = 131072,
    output: str = "runs/rare-latents",
    hook_name: str | Sequence[str] = ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
    steps: int = 400,
    batch_size: int = 1024,
    lr: float = 3e-3,
    held_out_tokens: int = 16384,
    **common: Any,
) -> None:
    """Count rare latents by width, penalty, length and hook, and explain their common direction.

    At each hook one ReLU SAE is the base. Others differ from it in one respect: the width; half and
    twice the penalty, and a square root in its place; what the encoder's input is measured from:
    `b_dec` that starts at the mean activation, as in the base, or at zero, or an encoder without
    it; and the length of training, with warm-ups as short as in the base, or longer too.
    Activations are not centred. The direction that rare latents
    share is compared between seeds, and with directions that follow from the data or from the
    initial weights. The study writes `results.json`, `saes.csv`, `over_time.csv`, pictures and
    `report.html`.

    Args:
        l1_coefficients: Of the base at each hook.
        widths: Numbers of latents, in multiples of the activations' width.
        expansion: That of the base.
        length: Multiple of `steps` for which SAEs of each origin are trained too; 1 for none.
        counted_tokens: Training tokens on which latents are counted after training.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook, or a list of them.
        steps: Optimizer steps of each SAE.
        batch_size: Activations in a step.
        lr: Learning rate.
        held_out_tokens: Held-out tokens for L0 and FVU.
        common: As for every study of a language model but `d_sae` and `center`; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, or `output` has something else in it.
    """
    hooks = [hook_name] if isinstance(hook_name, str) else list(hook_name)
    _check(l1_coefficients, hooks, widths)
    require_positive(expansion=expansion, length=length, counted_tokens=counted_tokens)
    setting = Setting(
        output,
        hooks,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        held_out_tokens=held_out_tokens,
        center=False,
        **common,
    )
    d_in = {name: setting.data(0, [name]).d_in for name in hooks}
    found = [
        variant
        for name, coefficient in zip(hooks, l1_coefficients, strict=True)
        for variant in variants(
            name,
            d_in[name],
            widths=widths,
            expansion=expansion,
            coefficient=coefficient,
            length=length,
        )
    ]
    own = {
        "l1_coefficients": [*l1_coefficients],
        "widths": [*widths],
        "expansion": expansion,
        "length": length,
        "counted_tokens": counted_tokens,
    }

    def one_seed(part: Path, seed: int) -> list[Row]:
        return _one_seed(setting, part, seed, found, counted_tokens)

    run_seeds(setting, own, one_seed, report)


def _check(coefficients: Sequence[float], hooks: Sequence[str], widths: Sequence[float]) -> None:
    if len(coefficients) != len(hooks) or not coefficients or min(coefficients) <= 0:
        raise ValueError(
            "Expected argument `l1_coefficients` to be a number above 0 for each of the "
            f"{len(hooks)} hooks of `hook_name` but got {list(coefficients)}."
        )
    if not widths or min(widths) <= 0 or len({*widths}) < len(widths):
        raise ValueError(
            f"Expected argument `widths` to be different numbers above 0 but got {list(widths)}."
        )


def _one_seed(
    setting: Setting, folder: Path, seed: int, found: Sequence[Variant], counted: int
) -> list[Row]:
    """Train and measure all SAEs of a seed, or read what was done before."""
    saes = train(setting, folder, found, seed)
    began, rows = time.perf_counter(), []
    for hook in setting.hook_names:
        own = [each for each in found if each.hook_name == hook and each.name in saes]
        data = setting.held_out([hook])
        done = all(stored(folder, variant.name).is_file() for variant in own)
        x, held_out = (None, None) if done else (sample(data, counted), _held_out(setting, data))
        for variant in own:

            def figures(variant: Variant = variant, x: Any = x, held_out: Any = held_out) -> Row:
                initial = initial_sum(folder, variant.name)
                return dict(without_nan(measure(saes[variant.name], x, held_out, initial)))

            row = variant.row(data.d_in) | {"seed": seed}
            row |= computed_once(stored(folder, variant.name), figures)
            if variant.length != 1:
                row |= over_time(read_snapshots(frequencies_path(folder, variant.name)))
            rows.append(row)
    seconds = time.perf_counter() - began
    sys.stderr.write(f"seed {seed}: measured {len(rows)} SAEs in {seconds:.0f} s\n")
    return rows


def _held_out(setting: Setting, data: ActivationDataModule) -> Float[Tensor, "n d_in"]:
    return torch.cat([rows.cpu() for rows in HeldOutBatches(data, setting.held_out_tokens)])
