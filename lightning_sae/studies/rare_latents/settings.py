"""The SAEs of the study of rare latents: one base at each hook, and what is varied from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_sae.studies.shared.rows import Row

RARE = 1e-4  # share of activations below which a latent is rare, as in the source
WINDOW = 0.05  # share of a long run in a snapshot of the frequencies
SQRT_SHARE = 0.5  # weight of the sqrt penalty for that of L1, for about the same L0

BASE, ZERO, NONE = "mean", "zero", "none"
ORIGINS = {
    BASE: "b_dec from the mean",
    ZERO: "b_dec from zero",
    NONE: "b_dec not in the encoder",
}
"""What the encoder's input is measured from, with the label in tables."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    BASE: {},
    ZERO: {"b_dec_init": "zero"},
    NONE: {"b_dec_init": "zero", "apply_b_dec_to_input": False},
}


@dataclass(frozen=True)
class Variant:
    """An SAE of the study.

    Attributes:
        hook_name: Where it is trained.
        d_sae: Its latents.
        coefficient: Weight of its penalty.
        sqrt: Whether the penalty is the square root in place of L1.
        origin: One of `ORIGINS`.
        length: Multiple of the study's steps for which it is trained.
        slow: Whether the warm-ups of the learning rate and of the penalty are longer by the same
            multiple; otherwise they have as many steps as in a run of length 1.
    """

    hook_name: str
    d_sae: int
    coefficient: float
    sqrt: bool = False
    origin: str = BASE
    length: float = 1.0
    slow: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        penalty = f"{'sqrt' if self.sqrt else 'l1'}-{self.coefficient:g}"
        name = f"{self.hook_name}-{self.d_sae}-{penalty}-{self.origin}-x{self.length:g}"
        name += "-slow" if self.slow else ""
        object.__setattr__(self, "name", name.replace("blocks.", "").replace("hook_", ""))

    def row(self, d_in: int) -> Row:
        """What was varied, as plain values."""
        return {
            "sae": self.name,
            "hook": self.hook_name,
            "d_sae": self.d_sae,
            "width": self.d_sae / d_in,
            "penalty": "sqrt" if self.sqrt else "L1",
            "coefficient": self.coefficient,
            "origin": self.origin,
            "length": self.length,
            "slow": self.slow,
        }


def variants(
    hook_name: str,
    d_in: int,
    *,
    widths: Sequence[float],
    expansion: float,
    coefficient: float,
    length: float,
) -> list[Variant]:
    """The base SAE at a hook, and those that differ from it in one respect.

    The base has `expansion` times `d_in` latents, an L1 penalty, and `b_dec` from the mean. The
    three origins are also trained `length` times as long, if that is not 1, and the base once more
    with slow warm-ups.
    """
    base = Variant(hook_name, round(expansion * d_in), coefficient)
    found = [replace(base, d_sae=round(width * d_in)) for width in widths]
    found += [replace(base, coefficient=factor * coefficient) for factor in (0.5, 1, 2)]
    found.append(replace(base, coefficient=SQRT_SHARE * coefficient, sqrt=True))
    for times in (1.0, length):
        found += [replace(base, origin=origin, length=times) for origin in ORIGINS]
    if length != 1:
        found.append(replace(base, length=length, slow=True))
    return list(dict.fromkeys(found))
