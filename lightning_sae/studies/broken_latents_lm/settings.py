"""The SAEs of the study of broken latents on a language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sae.architectures import MatryoshkaSAE, ReLUSAE, SparseAutoencoder, TiedSAE
from lightning_sae.architectures.peaks import PeakThreshold
from lightning_sae.studies.broken_latents_lm.rules import HighPeak, LowPeak, SmallPeak, WeakOfShare
from lightning_sae.studies.shared.rows import Row

WINDOW = 50  # batches over which a latent's activations count as recent, as in the source
SHARE, LOW_SHARE = 0.7, 0.05  # the source's threshold, and the best fallback in the toy world
INNER = 4  # a Matryoshka SAE's inner levels are its first d_sae / INNER latents

UNTIED, TIED, JUMPING, NESTED = "untied", "tied", "tied with thresholds", "Matryoshka"

KINDS: dict[str, type[SparseAutoencoder]] = {
    UNTIED: ReLUSAE,
    TIED: TiedSAE,
    JUMPING: TiedSAE,
    NESTED: MatryoshkaSAE,
}
"""Classes by the name in tables."""


@dataclass(frozen=True)
class Rule:
    """Which pairs of an input and a latent the auxiliary loss is over.

    Attributes:
        label: Its name in tables.
        kinds: The kinds of SAE that are trained with it.
        arguments: Arguments of the SAE, besides the loss's weight.
        peaks: Makes what chooses the pairs, from the number of latents; None for the package's.
        everywhere: Whether it is tried at all widths, and with all weights at the first; else it is
            tried at the first width, with the first weight.
        factor: Multiple of the study's weights that it is tried with.
    """

    label: str
    kinds: Sequence[str]
    arguments: dict[str, Any]
    peaks: Callable[[int], PeakThreshold] | None = None
    everywhere: bool = True
    factor: float = 1.0


OWN = {"orthogonality_side": "high", "orthogonality_window": WINDOW}
NONE = "none"
FEWER = 100.0
"""Weight of a loss over firings alone, relative to that over all pairs, which is so much larger."""

RULES = {
    NONE: Rule("no loss", tuple(KINDS), {}),
    "share": Rule(
        "up to .7 of the maximum",
        (UNTIED, TIED),
        {"orthogonality_threshold_share": SHARE, "orthogonality_window": WINDOW},
    ),
    "mixture": Rule(
        "up to the valley, else .05",
        tuple(KINDS),
        {
            "orthogonality_threshold": "mixture",
            "orthogonality_threshold_share": LOW_SHARE,
            "orthogonality_window": WINDOW,
        },
    ),
    "weak": Rule(
        "firings up to .7",
        (UNTIED, TIED),
        OWN,
        lambda d_sae: WeakOfShare(d_sae, SHARE, WINDOW),
        everywhere=False,
        factor=FEWER,
    ),
    "low": Rule(
        "firings of the low peak",
        (UNTIED, TIED, JUMPING),
        OWN,
        lambda d_sae: LowPeak(d_sae, WINDOW),
        factor=FEWER,
    ),
    "small": Rule(
        "firings of the smaller peak",
        (UNTIED, TIED),
        OWN,
        lambda d_sae: SmallPeak(d_sae, WINDOW),
        everywhere=False,
        factor=FEWER,
    ),
    "high": Rule(
        "firings of the high peak",
        (UNTIED, TIED),
        OWN,
        lambda d_sae: HighPeak(d_sae, WINDOW),
        everywhere=False,
        factor=FEWER,
    ),
    "inner-low": Rule(
        "low peak, inner levels",
        (NESTED,),
        OWN,
        lambda d_sae: LowPeak(d_sae, WINDOW, d_sae // INNER),
        factor=FEWER,
    ),
    "inner-high": Rule(
        "high peak, inner levels",
        (NESTED,),
        OWN,
        lambda d_sae: HighPeak(d_sae, WINDOW, d_sae // INNER),
        factor=FEWER,
    ),
}
"""The rules, by the name in files."""


@dataclass(frozen=True)
class Variant:
    """An SAE of the study.

    Attributes:
        kind: One of `KINDS`.
        d_sae: Its latents.
        rule: One of `RULES`.
        coefficient: Weight of the auxiliary loss; 0 without it.
    """

    kind: str
    d_sae: int
    rule: str = NONE
    coefficient: float = 0.0

    @property
    def name(self) -> str:
        """Its name in files."""
        weight = f"-{self.coefficient:g}" if self.coefficient else ""
        return f"{self.kind.replace(' ', '-')}-{self.d_sae}-{self.rule}{weight}"

    def row(self) -> Row:
        """What was varied, as plain values."""
        return {
            "sae": self.name,
            "kind": self.kind,
            "d_sae": self.d_sae,
            "rule": self.rule,
            "coefficient": self.coefficient,
        }

    def sae(self, d_in: int, l0: float, **common: Any) -> SparseAutoencoder:
        """The SAE before training.

        Args:
            d_in: Width of the activations.
            l0: Active latents per activation, to which the penalty is steered, or that are chosen.
            common: Arguments of all SAEs of the study.
        """
        rule = RULES[self.rule]
        arguments: dict[str, Any] = {**common, "d_sae": self.d_sae}
        arguments |= {"k": l0} if self.kind == NESTED else {"target_l0": l0}
        if self.kind == NESTED:
            widths = (self.d_sae // INNER**2, self.d_sae // INNER, self.d_sae)
            arguments["prefixes"] = [width for width in widths if width]
        if self.kind == JUMPING:
            arguments |= {"threshold_init": 0.5, "bandwidth": 0.5}
        if self.rule != NONE:
            arguments |= {**rule.arguments, "orthogonality_coefficient": self.coefficient}
        sae: Any = KINDS[self.kind](d_in, **arguments)
        if rule.peaks is not None:
            sae.peaks = rule.peaks(self.d_sae)
        return sae


def variants(widths: Sequence[int], coefficients: Sequence[float]) -> list[Variant]:
    """All SAEs: those of the first width with all weights of the loss, others with the first.

    Args:
        widths: Numbers of latents.
        coefficients: Weights of the auxiliary loss.
    """
    found = []
    for place, d_sae in enumerate(widths):
        for name, rule in RULES.items():
            if place > 0 and not rule.everywhere:
                continue
            weights = coefficients if place == 0 and rule.everywhere else coefficients[:1]
            for weight in [0.0] if name == NONE else weights:
                found += [Variant(kind, d_sae, name, rule.factor * weight) for kind in rule.kinds]
    return found
