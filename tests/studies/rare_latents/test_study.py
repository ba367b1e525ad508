"""The study of rare latents: from the command to the answers, and each figure by itself."""

import csv
import json
import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae import ReLUSAE, load
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.studies import main
from lightning_sae.studies.rare_latents.hyperplanes import descend, normal_of
from lightning_sae.studies.rare_latents.measure import measure, over_time
from lightning_sae.studies.rare_latents.report import between_seeds, shares_in_words
from lightning_sae.studies.rare_latents.settings import ORIGINS, Variant, variants
from lightning_sae.studies.rare_latents.train import _member, initial_sum
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.snapshots import Snapshots

HOOK = "blocks.1.hook_mlp_out"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: Sequence[str]) -> Path:
    folder = tmp_path_factory.mktemp("rare") / "new"
    common = [word for word in words if not word.startswith(("--d_sae", "--steps"))]
    own = ["--l1_coefficients=[200]", "--widths=[0.25]", "--expansion=0.25", "--length=2"]
    # So large a coefficient that some latents die in so few steps.
    own += [f"--hook_name={HOOK}", "--steps=20", "--lr=0.02", "--counted_tokens=512"]
    main(["rare-latents", f"--output={folder}", *common, *own, "--seeds=1"])
    return folder


@pytest.fixture
def setting_of(small: dict[str, Any], tmp_path: Path) -> Setting:
    return Setting(tmp_path / "setting", HOOK, **{**small, "steps": 40})


def test_every_sae_differs_from_the_base_in_one_respect(output: Path) -> None:
    rows = list(csv.DictReader((output / "saes.csv").read_text().splitlines()))
    base = {"width": "0.25", "penalty": "L1", "coefficient": "200.0", "origin": "mean"}
    base |= {"length": "1.0", "slow": "False"}
    changed = [{name for name in base if row[name] != base[name]} for row in rows]
    assert sorted(map(len, changed)) == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert {frozenset(each) for each in changed if len(each) == 2} == {
        frozenset({"penalty", "coefficient"}),  # the square root has its own weight
        frozenset({"origin", "length"}),
        frozenset({"length", "slow"}),
    }


def test_the_sum_of_initial_rows_is_of_before_training_and_of_unit_rows(output: Path) -> None:
    saes = sorted((output / "seed-0" / "x1" / "saes").iterdir())
    for folder in saes:
        sae = load(folder)
        first, now = initial_sum(output / "seed-0", folder.name), sae.W_dec.detach().sum(0)
        assert not torch.allclose(first, now)
        assert float(first.norm()) < 3 * math.sqrt(sae.d_sae)  # of random directions


def test_only_slow_runs_warm_up_for_longer(setting_of: Setting, tmp_path: Path) -> None:
    longer = copy(setting_of)
    longer.steps = 10 * setting_of.steps
    variant = Variant(HOOK, 16, 1.0, length=10.0)
    for warming in (setting_of, longer):
        member = _member(warming, longer, tmp_path, variant)
        penalty, rate = int(0.1 * warming.steps), int(0.05 * warming.steps)
        assert member["callbacks"][0]["init_args"]["n_steps"] == penalty
        assert member["sae"]["init_args"]["lr_warmup_steps"] == rate
        assert member["sae"]["init_args"]["lr_decay_steps"] == int(0.25 * longer.steps)


def test_origins_are_as_named(output: Path) -> None:
    for origin in ORIGINS:
        (folder,) = (output / "seed-0" / "x2" / "saes").glob(f"*-{origin}-x2")
        sae = load(folder)
        assert sae.hparams["b_dec_init"] == ("mean" if origin == "mean" else "zero")
        assert sae.apply_b_dec_to_input == (origin != "none")


def test_the_report_has_pictures_and_repeats_no_training(
    output: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (output / "report.html").read_text()
    assert "data:image/png" in page
    assert "Are they dying?" in page
    for name in ("shares.png", "directions.png"):
        assert (output / name).stat().st_size > 10_000
    found = json.loads((output / "results.json").read_text())
    assert any(row["rare"] > 0 for row in found["saes"])


@pytest.mark.parametrize("argument", ["--l1_coefficients=[1,2,3]", "--widths=[1,1]", "--length=0"])
def test_what_cannot_be_is_refused(argument: str, tmp_path: Path, words: Sequence[str]) -> None:
    common = [word for word in words if not word.startswith(("--d_sae", "--steps"))]
    with pytest.raises(ValueError, match="l1_coefficients|widths|length"):
        main(["rare-latents", f"--output={tmp_path / 'a'}", *common, argument])


# Figures.


def known_sae(rows: Tensor, b_enc: Tensor) -> ReLUSAE:
    sae = ReLUSAE(d_in=rows.shape[1], d_sae=len(rows), apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.b_enc.copy_(b_enc)
    return sae.eval()


def test_the_normal_of_a_shifted_sphere_points_against_the_shift() -> None:
    x = torch.randn(200_000, 3, generator=generator()) + torch.tensor([2.0, 0.0, 0.0])
    assert unit_rows(normal_of(x)[None])[0].tolist() == pytest.approx([-1, 0, 0], abs=0.01)
    # Twice as wide along the first axis, a tilted shift counts a quarter there.
    stretched = (x - torch.tensor([1.0, -1.0, 0.0])) * torch.tensor([2.0, 1.0, 1.0])
    expected = torch.tensor([-2 / 4, -1.0, 0.0])
    assert unit_rows(normal_of(stretched)[None])[0].tolist() == pytest.approx(
        unit_rows(expected[None])[0].tolist(), abs=0.01
    )


def test_descent_finds_the_side_without_data_where_there_is_one() -> None:
    half = torch.randn(5000, 4, generator=generator())
    half[:, 0] = half[:, 0].abs() + 1.0  # everything beyond a plane
    ends = descend(half, torch.randn(6, 4, generator=generator()), 0.0, generator())
    assert float((half @ ends.T > 0).double().mean()) < 1e-3
    assert (ends[:, 0] < -0.6).all()


def test_a_direction_that_never_fires_is_not_turned() -> None:
    x = torch.randn(500, 4, generator=generator())
    rows = unit_rows(torch.randn(3, 4, generator=generator()))
    assert torch.allclose(descend(x, rows, -100.0, generator()), rows, atol=1e-6)


def test_rare_latents_are_counted_and_their_direction_is_compared() -> None:
    x = torch.randn(20_000, 4, generator=generator()) + torch.tensor([1.0, 0.0, 0.0, 0.0])
    rows = torch.tensor([[-1.0, 0, 0, 0], [-2.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    sae = known_sae(rows, torch.tensor([-9.0, -18.0, 0.0, 0.0]))
    found = measure(sae, x, x[:1000], torch.tensor([0.0, 3.0, 0.0, 0.0]))
    assert (found["rare"], found["never"], found["n_rare"]) == (0.5, 0.5, 2.0)
    assert found["l0"] == pytest.approx(1.0, abs=0.1)
    assert found["direction"] == [-1.0, 0.0, 0.0, 0.0]
    assert found["with_others"] == found["with_initial"] == 0.0
    assert found["with_normal"] == found["with_data_normal"] > 0.99
    assert found["with_input"] == found["with_data"] > 0.99
    assert found["rare_moved"] == pytest.approx(1.0)
    with_all = measure(known_sae(rows, torch.zeros(4)), x, x[:1000], torch.ones(4))
    assert "direction" not in with_all


def test_latents_chosen_as_rare_are_followed_to_the_end() -> None:
    n = torch.full((10,), 100_000)
    counts = torch.tensor([[50_000, 5, 5, 0]]).repeat(10, 1)
    counts[3:, 1], counts[3:, 2] = 1, 20_000  # after the choice one gets rarer, one frequent
    found = over_time(Snapshots(torch.arange(1, 11), n, counts))
    assert (found["chosen_at"], found["chosen"]) == (3, 3)
    assert found["still_rare"] == pytest.approx(2 / 3)
    assert found["rarer"] == 0.5
    assert found["rare_over_time"] == [0.75] * 3 + [0.5] * 7
    assert found["silent"][-1] == pytest.approx(1 / 3)


def row(seed: int, width: float, rare: float, **more: Any) -> dict[str, Any]:
    base = {"sae": f"w{width}", "hook": HOOK, "d_sae": int(128 * width), "width": width}
    fixed = {
        "penalty": "L1",
        "coefficient": 1.0,
        "origin": "mean",
        "length": 1.0,
        "slow": False,
        "seed": seed,
    }
    return {**base, **fixed, "rare": rare, **more}


def test_words_follow_from_the_figures() -> None:
    rows = [row(0, 2.0, 0.1), row(0, 4.0, 0.3), row(1, 2.0, 0.3), row(1, 4.0, 0.1)]
    assert "20.0% of latents are rare at 2 times the width, 20.0% at 4" in shares_in_words(rows)
    assert "never falls in between in 1 of 2 seeds" in shares_in_words(rows)


def test_seeds_are_compared_pair_by_pair() -> None:
    rows = [
        row(0, 2.0, 0.1, direction=[1.0, 0.0]),
        row(1, 2.0, 0.1, direction=[0.6, 0.8]),
        row(2, 2.0, 0.0),
    ]
    (found,) = between_seeds(rows)
    assert (found["seeds"], found["cosine"]) == ("0, 1", pytest.approx(0.6))


def test_the_base_and_what_is_varied_have_no_doubles() -> None:
    found = variants(HOOK, 128, widths=(2, 4), expansion=4, coefficient=4.0, length=1.0)
    assert len({each.name for each in found}) == len(found) == 1 + 1 + 2 + 1 + 2
