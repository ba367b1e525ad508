"""What tests of other libraries' formats share; the package is imported inside fixtures only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

D_IN, D_SAE = 6, 20
SOURCE = {
    "model": "org/model",
    "hook_name": "blocks.3.hook_resid_post",
    "head": None,
    "context_length": 64,
    "text": "org/text",
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("ReLUSAE", {}),
    "relu, no centring": ("ReLUSAE", {"apply_b_dec_to_input": False}),
    "tied": ("TiedSAE", {}),
    "tied with thresholds": ("TiedSAE", {"threshold_init": 0.3}),
    "topk": ("TopKSAE", {"k": 4}),
    "batch topk": ("BatchTopKSAE", {"k": 4}),
    "batch topk, no centring": ("BatchTopKSAE", {"k": 4, "apply_b_dec_to_input": False}),
    "matryoshka": ("MatryoshkaSAE", {"k": 4, "prefixes": (5, 20)}),
    "matryoshka, random": ("MatryoshkaSAE", {"k": 4, "prefixes": 3}),
    "matryoshka, relu": ("MatryoshkaSAE", {"k": None}),
    "jumprelu": ("JumpReLUSAE", {}),
    "jumprelu, no centring": ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
    "gated": ("GatedSAE", {}),
    "gated, no centring": ("GatedSAE", {"apply_b_dec_to_input": False}),
    "rescale and shift": ("RescaleAndShiftSAE", {}),
    "rescaled": ("RescaledSAE", {}),
}
"""Names of SAEs, and class and arguments of each."""


@pytest.fixture
def x() -> Tensor:
    """Raw activations, not centred and not of norm 1."""
    return 3 * torch.randn(200, D_IN) + 1


@pytest.fixture
def sae_of() -> Callable[..., Any]:
    """Makes an SAE of random weights, with scaled and centred inputs unless told otherwise."""
    import lightning_sae

    def sae_of(name: str, scaled: bool = True, **more: Any) -> Any:
        kind, arguments = KINDS[name]
        sae = getattr(lightning_sae, kind)(D_IN, D_SAE, **{**arguments, **more})
        weights = dict(sae.named_parameters())
        with torch.no_grad():
            for weight in weights.values():
                weight.normal_()
            for positive in ("threshold", "scale"):
                if positive in weights:
                    weights[positive].abs_()
            if name == "rescale and shift":
                sae.b_mag.abs_()
            if name.startswith(("batch", "matryoshka")) and "relu" not in name:
                sae.threshold.fill_(0.7)
            if scaled:
                sae.input_mean.normal_()
                sae.input_scale.fill_(2.5)
        sae.source = dict(SOURCE)
        return sae.eval()

    return sae_of


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares latents and reconstructions to 1e-5 of their size, and which latents are active."""

    def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        assert torch.equal(found[0] != 0, expected[0] != 0)
        assert 0 < (expected[0] != 0).float().mean() < 1

    return assert_same


@pytest.fixture
def there_and_back(
    x: Tensor, assert_same: Callable[..., None], tmp_path: Path
) -> Callable[..., tuple[Path, Any]]:
    """Exports an SAE and loads the folder; both compute what the SAE does.

    Returns the folder and the loaded SAE.
    """
    import lightning_sae
    from lightning_sae.interop import export

    def there_and_back(
        sae: Any, format: str, forward: Callable[..., tuple[Tensor, Tensor]], name: str = "out"
    ) -> tuple[Path, Any]:
        folder = export(sae, tmp_path / name, format)
        expected = (sae.encode(x), sae(x))
        assert_same(forward(folder, x), expected)
        back = lightning_sae.load(folder)
        assert_same((back.encode(x), back(x)), expected)
        return folder, back

    return there_and_back


def own_source(sae: Any) -> dict[str, Any]:
    """What an SAE says of its activations, without how it was imported."""
    return {name: value for name, value in sae.source.items() if name != "imported"}


def stated() -> dict[str, Any]:
    """The entries of `SOURCE` that are not None."""
    return {name: value for name, value in SOURCE.items() if value is not None}
