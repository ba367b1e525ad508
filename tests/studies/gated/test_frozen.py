"""Frozen ReLU SAEs whose latents get a scale and a shift."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import ReLUSAE, load
from lightning_sae.studies import main
from lightning_sae.studies.gated.frozen import on_frozen
from lightning_sae.studies.shared.rows import select

OWN = ("--families=relu,gated", "--learning_rates=[1e-2]", "--tuning_steps=2", "--frozen=true")
COEFFICIENTS = '--coefficients={"relu": [0.1, 1], "gated": [0.1, 1]}'


@pytest.fixture
def sae() -> ReLUSAE:
    """One whose latents are coordinates, each too small by .5."""
    sae = ReLUSAE(4, 4)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
        sae.b_enc.fill_(-0.5)
    sae.is_trained = True
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(512, 4, generator=generator) < 0.3
    return (1 + torch.rand(512, 4, generator=generator)) * fires


def test_it_begins_as_the_same_function(sae: ReLUSAE, x: torch.Tensor) -> None:
    assert torch.equal(on_frozen(sae)(x), sae(x))


def test_shrinkage_is_undone_and_the_same_latents_fire(sae: ReLUSAE, x: torch.Tensor) -> None:
    found = on_frozen(sae, lr=1e-2)
    optimizer = torch.optim.Adam([w for w in found.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(2000):
        optimizer.zero_grad()
        torch.stack(list(found.objective(x).losses.values())).sum().backward()
        optimizer.step()
    assert torch.allclose(found.b_mag, torch.full((4,), 0.5), atol=1e-2)
    assert torch.allclose(found.r_mag, torch.zeros(4), atol=1e-2)
    assert torch.allclose(found(x), x, atol=1e-2)
    assert torch.equal(found.encode(x) != 0, sae.encode(x) != 0)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(found, name), getattr(sae, name)), name


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("frozen") / "new"
    main(["gated", f"--output={folder}", *words, *OWN, COEFFICIENTS, "--seeds=2"])
    return folder


def test_the_study_keeps_l0_and_lowers_the_error(output: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["saes"]
    found = select(rows, family="frozen-rescale-shift")
    about = [(row["seed"], row["coefficient"]) for row in found]
    assert about == [(seed, coefficient) for seed in (0, 1) for coefficient in (0.1, 1.0)]
    for row in found:
        (before,) = select(rows, family="relu", seed=row["seed"], coefficient=row["coefficient"])
        assert row["l0"] == pytest.approx(before["l0"], rel=1e-3)  # rounding of other units
        assert row["fvu"] < before["fvu"]
    page = (output / "report.html").read_text()
    assert "L0 of frozen ReLU, rescaled and shifted" in page


def test_only_scale_and_shift_of_the_saved_saes_differ(output: Path) -> None:
    relu = load(output / "seed-1" / "saes" / "relu-1.0")
    found: Any = load(output / "seed-1" / "frozen" / "saes" / "frozen-rescale-shift-1.0")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.allclose(getattr(found, name), getattr(relu, name), atol=1e-4), name
    assert bool(found.b_mag.any())


def test_a_finished_study_says_the_same_again(
    output: Path, words: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (output / "results.json").read_text()
    monkeypatch.setattr(
        "lightning_sae.studies.shared.training._fit", lambda *_: pytest.fail("trained again")
    )
    main(["gated", f"--output={output}", *words, *OWN, COEFFICIENTS, "--seeds=2"])
    assert (output / "results.json").read_text() == before
