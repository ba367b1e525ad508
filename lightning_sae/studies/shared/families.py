"""Families of SAEs that differ only in the weight of their penalty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_sae.studies.shared.setting import Setting

CALLBACKS = "lightning_sae.callbacks"


@dataclass(frozen=True)
class Family:
    """SAEs that differ only in the weight of their penalty.

    Attributes:
        name: Name in files and arguments.
        label: Name in tables and plots.
        architecture: `class_path` of the SAE.
        coefficients: Weights of the penalty, in increasing order.
        arguments: `init_args` of the SAE, besides those shared by all SAEs of a study.
        swept: The argument of the SAE that a coefficient is the value of.
        callbacks: Descriptions of more callbacks.
    """

    name: str
    label: str
    architecture: str
    coefficients: tuple[float, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    swept: str = "l1_coefficient"
    callbacks: tuple[Mapping[str, Any], ...] = ()

    @property
    def middle(self) -> float:
        """The coefficient in the middle of the sweep."""
        return self.coefficients[len(self.coefficients) // 2]

    def member(self, setting: Setting, name: str, coefficient: float, lr: float) -> dict[str, Any]:
        """The description of an SAE for `SideBySide`.

        The penalty rises over the first tenth of the run, unless it is steered to a target L0;
        decoder rows are kept at norm 1 unless the SAE weights its penalty by their norms.
        """
        own = {**self.arguments, self.swept: coefficient, "lr": lr}
        warmup = {"n_steps": max(1, setting.share(0.1))}
        callbacks: list[dict[str, Any]] = []
        if self.swept != "target_l0":
            callbacks.append({"class_path": f"{CALLBACKS}.L1Warmup", "init_args": warmup})
        if self.arguments.get("decoder_norm") != "free":
            callbacks.append({"class_path": f"{CALLBACKS}.DecoderNormProjection"})
        sae = {"class_path": self.architecture, "init_args": setting.arguments(**own)}
        return {"name": name, "sae": sae, "callbacks": [*callbacks, *map(dict, self.callbacks)]}


def choose(
    families: Sequence[Family],
    names: str,
    coefficients: Mapping[str, Sequence[float]] | None,
    argument: str,
) -> list[Family]:
    """Families by name, with the user's coefficients in place of their own.

    Args:
        families: All families; the first is the baseline and has to be among the names.
        names: Names with commas between them.
        coefficients: By name; a family without an entry keeps its own.
        argument: Name of the argument `names` for the user, for errors.

    Raises:
        ValueError: If a name or a coefficient is not valid.
    """
    by_name = {family.name: family for family in families}
    wanted = [name.strip() for name in names.split(",")]
    first = families[0].name
    if not {first} <= {*wanted} <= {*by_name} or len({*wanted}) < len(wanted) or len(wanted) < 2:
        raise ValueError(
            f"Expected argument `{argument}` to be `{first}` and different ones of "
            f"{', '.join(name for name in by_name if name != first)} with commas between them but "
            f"got {names!r}."
        )
    given = dict(coefficients or {})
    if not {*given} <= {*wanted}:
        raise ValueError(
            f"Expected argument `coefficients` to be lists for {', '.join(wanted)} but got some "
            f"for {', '.join(sorted({*given} - {*wanted}))}."
        )
    return [
        replace(family, coefficients=_rising(family.name, given[family.name]))
        if family.name in given
        else family
        for family in families
        if family.name in wanted
    ]


def _rising(name: str, coefficients: Sequence[float]) -> tuple[float, ...]:
    if len({*coefficients}) < max(2, len(coefficients)) or min(coefficients) <= 0:
        raise ValueError(
            f"Expected argument `coefficients` to have at least two different positive numbers for "
            f"`{name}` but got {list(coefficients)}."
        )
    return tuple(sorted(map(float, coefficients)))
