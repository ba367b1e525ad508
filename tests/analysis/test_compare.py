"""SAEs compared with permuted, rotated and random ones."""

import json
from pathlib import Path

import pytest
import torch

from lightning_sae import ReLUSAE
from lightning_sae.analysis.compare import compare, compare_rare, compare_weights, matched


def permuted(sae: ReLUSAE, order: torch.Tensor) -> ReLUSAE:
    other = ReLUSAE(sae.d_in, sae.d_sae)
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[order])
        other.W_enc.copy_(sae.W_enc[:, order])
        other.b_enc.copy_(sae.b_enc[order])
    other.source = sae.source
    return other


def test_permuted_latents_are_found_again() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    sae = ReLUSAE(16, 20)
    found = compare_weights(sae, permuted(sae, order))
    assert torch.equal(order[found["pairs"][:, 1]], found["pairs"][:, 0])
    assert found["figures"]["decoder_mean"] == pytest.approx(1.0)
    assert found["figures"]["encoder_above_0.9"] == 1.0
    assert found["figures"]["random_mean"] < 0.9


def test_independent_saes_match_as_well_as_random_rows_do() -> None:
    torch.manual_seed(1)
    figures = compare_weights(ReLUSAE(32, 64), ReLUSAE(32, 64))["figures"]
    assert figures["decoder_mean"] == pytest.approx(figures["random_mean"], abs=0.03)


def test_a_matching_has_as_many_pairs_as_the_smaller_has_rows() -> None:
    a, b = torch.eye(4), torch.eye(4)[[2, 0]]
    rows, columns, cosines = matched(a, b)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 2: 0}
    assert cosines.tolist() == [1.0, 1.0]


def test_the_command_writes_figures_and_a_picture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = ReLUSAE(128, 24)
    sae.source = {"model": "embedded", "hook_name": "blocks.1.hook_resid_post", "text": "embedded"}
    one = str(sae.save_pretrained(tmp_path / "one"))
    two = str(permuted(sae, torch.arange(23, -1, -1)).save_pretrained(tmp_path / "two"))
    folder = compare([one, two], str(tmp_path / "out"), tokens=4096)
    (found,) = json.loads((folder / "compare.json").read_text())
    assert found["pairs"] == [[i, 23 - i] for i in range(24)]
    assert min(found["correlation"]) == pytest.approx(1.0, abs=1e-4)
    assert (folder / "compare.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="holds files"):
        compare([one, two], str(folder))
    with pytest.raises(ValueError, match="two or more but got 1"):
        compare([one], str(tmp_path / "other"))


def test_rare_latents_of_both_share_a_direction_or_not() -> None:
    torch.manual_seed(0)
    a, b = ReLUSAE(16, 40), ReLUSAE(16, 40)
    frequency = torch.full((40,), 1e-2)
    frequency[:5] = 1e-5
    with torch.no_grad():
        a.W_enc[:, :5] = b.W_enc[:, :5] = 0
        a.W_enc[2, :5] = 1
        b.W_enc[2, :5] = b.W_enc[3, :5] = 2
    found = compare_rare(a, b, (frequency, frequency))
    assert found == {"rare_a": 5, "rare_b": 5, "rare_direction_cosine": pytest.approx(0.5**0.5)}
    assert compare_rare(a, b, (frequency, torch.ones(40))) == {"rare_a": 5, "rare_b": 0}


def test_saes_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="same `d_in` but got 4 and 5"):
        compare_weights(ReLUSAE(4, 8), ReLUSAE(5, 8))
