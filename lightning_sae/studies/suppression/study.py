"""The study of suppression: how much do activations shrink, and does fine-tuning undo it?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.checks import require_not_negative, require_positive
from lightning_sae.studies.shared.seeds import run_seeds
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.suppression.measure import measure
from lightning_sae.studies.suppression.report import report
from lightning_sae.studies.suppression.theory import shrunk_features
from lightning_sae.studies.suppression.train import fine_tuned, given_saes, trained

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
    """Fine-tune SAEs without their sparsity penalty by seven methods and measure the gain.

    An SAE is trained at each hook on one pass of the language model, or given by `sae`. Copies of
    it are fine-tuned by each method, all hooks and methods on one more pass, and measured on
    held-out text. SAEs are also trained on toy features of several strengths and frequencies, whose
    shrinkage is known from theory. The study writes `results.json`, `methods.csv`, `latents.csv`,
    `toy.csv`, pictures and `report.html`.

    Args:
        l1_coefficient: Weight of the penalty of the SAEs to train.
        sae: Folders of trained SAEs to use instead of training, one for each hook and in their
            order. Their baseline keeps the penalty they were trained with, which is that of
            activations centred and scaled to mean norm sqrt(d_in).
        fine_tune_steps: Optimizer steps of each fine-tuned copy.
        toy_steps: Optimizer steps of each SAE on toy features.
        output: A new or empty folder, or that of this study with the same settings.
        hook_name: TransformerLens name of the hook, or a list of them; by default the residual
            stream after each block of the embedded model.
        steps: Optimizer steps of the SAE at each hook.
        common: As for every study of a language model; see `Setting`.

    Raises:
        ValueError: If an argument is out of range, an SAE does not fit its hook, or `output` has
            something else in it.
    """
    setting = Setting(output, hook_name, steps=steps, **common)
    require_not_negative(l1_coefficient=l1_coefficient)
    require_positive(fine_tune_steps=fine_tune_steps, toy_steps=toy_steps)
    given = given_saes(sae, setting)
    own = {
        "l1_coefficient": l1_coefficient,
        "sae": None if sae is None else [str(Path(each).resolve()) for each in sae],
        "fine_tune_steps": fine_tune_steps,
        "toy_steps": toy_steps,
    }

    def one_seed(part: Path, seed: int) -> dict[str, Any]:
        originals = given or trained(setting, part, l1_coefficient, seed)
        starts, copies = fine_tuned(
            setting, part / "fine-tuned", originals, fine_tune_steps, seed, setting.data(seed)
        )
        found = measure(setting, part, starts, copies, seed)
        return {**found, "toy": shrunk_features(seed, toy_steps, part / "toy.json")}

    run_seeds(setting, own, one_seed, report)
