"""The SAEs of the study of low activations: trained here, or given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.loading import load
from lightning_sae.studies.shared.families import Family
from lightning_sae.studies.shared.setting import Setting

RELU = "lightning_sae.ReLUSAE"
SQRT = {"penalty": {"class_path": "lightning_sae.functional.penalties.Sqrt"}}


def given_saes(
    folders: Sequence[str], hook_name: str, setting: Setting
) -> dict[str, SparseAutoencoder]:
    """The SAEs in folders, by the folders' names; none if there are no folders."""
    if not folders:
        return {}
    found = {Path(folder).resolve().name: load(folder) for folder in folders}
    if len(found) < len(folders):
        raise ValueError(
            f"Expected argument `sae` to be folders with different names but got {list(folders)}: "
            "copy one to a folder with another name."
        )
    width = setting.data().d_in
    for name, sae in found.items():
        trained_at = sae.source.get("hook_name", hook_name)
        if trained_at != hook_name or sae.d_in != width:
            raise ValueError(
                f"Expected argument `sae` to be SAEs at `hook_name`={hook_name}, {width} wide, but "
                f"{name} is one at {trained_at}, {sae.d_in} wide: give its hook and model."
            )
    return found


def families_of(coefficients: Sequence[float], sqrt_coefficients: Sequence[float]) -> list[Family]:
    """SAEs with an L1 penalty, and SAEs with a square-root penalty."""
    return [
        Family("l1", "L1", RELU, tuple(coefficients)),
        Family("sqrt", "square root", RELU, tuple(sqrt_coefficients), SQRT),
    ]


def members_of(setting: Setting, families: Sequence[Family]) -> list[dict[str, Any]]:
    """Descriptions of all SAEs for `SideBySide`."""
    return [
        family.member(setting, f"{family.name}-{value:g}", value, setting.lr)
        for family in families
        for value in family.coefficients
    ]
