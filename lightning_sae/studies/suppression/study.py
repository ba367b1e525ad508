"""The study of feature suppression: how much do latents shrink, and does fine-tuning mend it?"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.checks import require_not_negative, require_positive
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.suppression.report import report
from lightning_sae.studies.suppression.theory import shrunk_features
from lightning_sae.studies.suppression.train import given_saes, measured, trained

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


def suppression(
    l1_coefficient: float = 2.0,
    sae: Sequence[str] | None = None,
    fine_tune_steps: int = 600,
    toy_steps: int = 2000,
    output: str = "runs/suppression",
    hook_name: str | Sequence[str] = HOOKS,
    steps: int = 2000,
    **common: Any,
) -> None:
    """Fine-tune SAEs without their sparsity penalty, by seven methods, and see what that mends.

    An SAE is trained at each hook on one pass of the language model, or given by `sae`. Copies of
    it are fine-tuned by each method, all hooks and methods on one more pass, and measured on
    held-out text. Beside it SAEs are trained on toy features of several strengths and frequencies,
    of which theory says by how much they shrink. Written are `results.json`, `methods.csv`,
    `latents.csv`, `toy.csv`, pictures and `report.html`.

    Args:
        l1_coefficient: Weight of the penalty of the SAEs to train.
        sae: Folders of trained SAEs, one for each hook and in their order, which are then taken in
            place of training any. Their baseline goes on with the penalty they were trained with,
            which is that of activations centred and scaled to mean norm sqrt(d_in).
        fine_tune_steps: Optimiser steps of each fine-tuned copy.
        toy_steps: Optimiser steps of each SAE on toy features.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook, or a list of them; by default the residual
            stream behind each block of the embedded model.
        steps: Optimiser steps of the SAE at each hook.
        common: What the studies of language models have in common; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, an SAE does not fit its hook, or `output` has
            something else in it.
    """
    setting = Setting(output, hook_name, steps=steps, **common)
    require_not_negative(l1_coefficient=l1_coefficient)
    require_positive(fine_tune_steps=fine_tune_steps, toy_steps=toy_steps)
    given = given_saes(sae, setting)
    folder = setting.open(
        l1_coefficient=l1_coefficient,
        sae=None if sae is None else [str(Path(each).resolve()) for each in sae],
        fine_tune_steps=fine_tune_steps,
        toy_steps=toy_steps,
    )
    began = time.perf_counter()
    results = []
    for seed in range(setting.seeds):
        part = folder / f"seed-{seed}"
        originals = given or trained(setting, part, l1_coefficient, seed)
        found = measured(setting, part, originals, fine_tune_steps, seed)
        results.append({**found, "toy": shrunk_features(seed, toy_steps, part / "toy.json")})
    page, made = report(folder, results)
    seconds = time.perf_counter() - began
    last = f"Made: {', '.join(map(str, made))}, in {seconds:.0f} s."
    sys.stdout.write("\n".join([*page.lines(), "", last]) + "\n")
