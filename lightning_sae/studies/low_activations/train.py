"""The SAEs of the study of low activations: trained here, or given."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
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


def families_of(swept: Mapping[str, Sequence[float]]) -> list[Family]:
    """The kinds of SAE, each at its values; those without values are left out.

    Args:
        swept: By kind, L1 coefficients of `l1`, `sqrt` and `gated`; target L0 of `jumprelu`.
    """
    kinds = (
        Family("l1", "L1", RELU, ()),
        Family("sqrt", "square root", RELU, (), SQRT),
        Family("gated", "gated", "lightning_sae.GatedSAE", ()),
        Family("jumprelu", "JumpReLU", "lightning_sae.JumpReLUSAE", (), swept="target_l0"),
    )
    return [
        replace(kind, coefficients=tuple(swept[kind.name])) for kind in kinds if swept[kind.name]
    ]


def saes_of(families: Sequence[Family], length: float) -> dict[str, tuple[Family, float]]:
    """Family and value of each SAE by its name, which also tells how long it is trained.

    Args:
        families: The kinds of SAE.
        length: Length of training, in multiples of the study's steps.

    Example:
        >>> list(saes_of([Family("l1", "L1", RELU, (0.5, 2.0))], 10))
        ['l1-0.5-x10', 'l1-2-x10']
    """
    end = "" if length == 1 else f"-x{length:g}"
    return {
        f"{family.name}-{value:g}{end}": (family, value)
        for family in families
        for value in family.coefficients
    }


def labels_of(families: Sequence[Family], lengths: Sequence[float]) -> dict[str, str]:
    """For each SAE a label of its kind and length; only SAEs with the same one are compared."""
    return {
        name: family.label if length == 1 else f"{family.label}, trained {length:g} times as long"
        for length in lengths
        for name, (family, _) in saes_of(families, length).items()
    }


def members_of(
    setting: Setting, families: Sequence[Family], length: float = 1
) -> list[dict[str, Any]]:
    """Descriptions for `SideBySide` of all SAEs that are trained for a length."""
    longer = scaled(setting, length)
    return [
        family.member(longer, name, value, setting.lr)
        for name, (family, value) in saes_of(families, length).items()
    ]


def scaled(setting: Setting, length: float) -> Setting:
    """The setting with a multiple of its steps."""
    longer = copy(setting)
    longer.steps = max(1, round(length * setting.steps))
    return longer
