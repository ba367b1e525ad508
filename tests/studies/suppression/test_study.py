"""The study of suppression: from the command to the answers."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import GatedSAE, ReLUSAE, RescaledSAE, load
from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.functional.correlation import correlation, partial_correlation
from lightning_sae.studies import main
from lightning_sae.studies.shared import evaluation as evaluating
from lightning_sae.studies.shared import page
from lightning_sae.studies.shared import training as together
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.suppression import report as suppression_report
from lightning_sae.studies.suppression import theory
from lightning_sae.studies.suppression import train as stages
from lightning_sae.studies.suppression.comparison import (
    AVERAGES,
    comparison,
    killed,
    order_in_words,
)
from lightning_sae.studies.suppression.measure import (
    associations,
    learned_scaling,
    living,
)
from lightning_sae.studies.suppression.plots import short

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
OWN = [f"--hook_name={json.dumps(HOOKS)}", "--fine_tune_steps=6", "--toy_steps=4", "--lr=0.003"]
METHODS = ["original", *stages.METHODS]
FROZEN = ["scale", "decoder", "unrotated_decoder"]


def study(folder: Path, *arguments: str) -> None:
    main(["suppression", f"--output={folder}", *arguments])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("suppression") / "new"
    study(folder, *words, *OWN, "--seeds=1")
    return folder


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a small study, and the first one has drawn them."""
    for name in ("bars", "frequencies", "latents", "theory"):
        monkeypatch.setattr(suppression_report, f"draw_{name}", lambda _, path: path)
    monkeypatch.setattr(page, "_embedded", lambda _: "")


# The command.


def test_every_hook_and_method_has_its_row(output: Path, results: dict[str, Any]) -> None:
    found = [(row["seed"], row["hook"], row["method"]) for row in results["methods"]]
    assert found == [(0, hook, method) for hook in HOOKS for method in METHODS]
    table = rows_of(output / "methods.csv")
    assert [float(row["mse"]) for row in table] == [row["mse"] for row in results["methods"]]
    assert all(math.isfinite(row["perplexity_spliced"]) for row in results["methods"])
    assert len(rows_of(output / "latents.csv")) == 2 * 24
    assert len(rows_of(output / "toy.csv")) == 3 * 24
    html = (output / "report.html").read_text()
    assert html.count("data:image/png") == 4
    assert "unrotated decoder" in html


def test_copies_start_from_the_same_sae_and_train_what_their_method_says(output: Path) -> None:
    tuned = output / "seed-0" / "fine-tuned"
    for hook in HOOKS:
        start = load(tuned / "starts" / hook, RescaledSAE)
        trained = load(output / f"seed-0/trained/saes/{hook}")
        x = torch.randn(20, 128)  # through the data's scaling and back
        torch.testing.assert_close(start.encode(x), trained.encode(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(start(x), trained(x), rtol=1e-3, atol=1e-4)
        for method in FROZEN:
            copied = load(tuned / "saes" / f"{hook}-{method}", RescaledSAE)
            assert torch.equal(copied.W_enc, start.W_enc)
            assert torch.equal(copied.b_enc, start.b_enc)
            assert torch.equal(copied.origin, start.origin)
            assert (copied.scale != 1).any()
            assert torch.equal(copied.W_dec, start.W_dec) == (method != "decoder")
        assert type(load(tuned / "saes" / f"{hook}-baseline")) is ReLUSAE


def test_with_the_encoder_frozen_no_token_has_other_latents(results: dict[str, Any]) -> None:
    for row in results["methods"]:
        assert row["differing"] == (0 if row["method"] in FROZEN else None)
    for hook in HOOKS:
        l0 = {row["method"]: row["l0"] for row in results["methods"] if row["hook"] == hook}
        assert {l0[method] for method in FROZEN} == {l0["original"]}
        assert l0["encoder"] != l0["original"]


def test_recovered_shares_are_those_of_the_definition(results: dict[str, Any]) -> None:
    own = [row for row in results["methods"] if row["hook"] == HOOKS[0]]
    original = own[0]
    assert original["mse_removed"] == original["perplexity_recovered"] == 0
    for row in own:
        assert row["mse"] == pytest.approx((1 - row["mse_removed"]) * original["mse"])
        gap = row["perplexity_spliced"] - row["perplexity_clean"]
        whole = original["perplexity_spliced"] - original["perplexity_clean"]
        assert gap == pytest.approx((1 - row["perplexity_recovered"]) * whole)


@torch.no_grad()
def test_latents_are_those_that_a_plain_loop_finds(output: Path, small: dict[str, Any]) -> None:
    hook = HOOKS[1]
    start = load(output / "seed-0" / "fine-tuned" / "starts" / hook)
    decoder = load(output / f"seed-0/fine-tuned/saes/{hook}-decoder", RescaledSAE)
    data = Setting(output, hook, **small).data()
    x = torch.cat(list(HeldOutBatches(data, small["held_out_tokens"])))
    rows = [row for row in rows_of(output / "latents.csv") if row["hook"] == hook]
    for j in (0, 7, 23):
        fired = [float(f) for f in start.encode(x)[:, j] if f > 0]
        assert float(rows[j]["frequency"]) == pytest.approx(len(fired) / len(x))
        if fired:
            mean = sum(fired) / len(fired)
            assert float(rows[j]["strength"]) == pytest.approx(mean, rel=1e-4)
            grown = decoder.scale[j] * decoder.W_dec[j].norm() / start.W_dec[j].norm()
            assert float(rows[j]["scaling"]) == pytest.approx(grown.item(), rel=1e-5)
            added = float(rows[j]["added"])
            assert added == pytest.approx((grown.item() - 1) * mean, rel=1e-3, abs=1e-6)
        cosine = torch.cosine_similarity(start.W_dec[j], decoder.W_dec[j], dim=0)
        assert float(rows[j]["cosine"]) == pytest.approx(cosine.item(), rel=1e-5)


def test_the_same_command_again_trains_nothing(
    output: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(together, "_fit", unwanted)
    monkeypatch.setattr(evaluating, "held_out_figures", unwanted)
    without_pictures(monkeypatch)
    monkeypatch.setattr(theory, "_learnt", unwanted)
    before = (output / "results.json").read_text()
    study(output, *words, *OWN, "--seeds=1")
    assert (output / "results.json").read_text() == before
    out = capsys.readouterr().out
    assert "layer 2, unrotated decoder" in out
    assert out.strip().splitlines()[-1].startswith(f"Made: {output}/results.json")


def test_given_saes_are_fine_tuned_and_a_killed_study_goes_on(
    output: Path,
    words: list[str],
    tmp_path: Path,
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one of the hooks alone: the same copies on the same tokens as beside the other hook."""
    without_pictures(monkeypatch)
    config = tmp_path / "study.yaml"
    config.write_text(
        f"sae: [{output / 'seed-0' / 'trained' / 'saes' / HOOKS[1]}]\nhook_name: {HOOKS[1]}\n"
        f"output: {tmp_path / 'given'}\nfine_tune_steps: 6\ntoy_steps: 4\nlr: 0.003\nseeds: 1\n"
    )

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(together, "_export", dies)
        with pytest.raises(KeyboardInterrupt):
            main(["suppression", f"--config={config}", *words])
    assert not (tmp_path / "given" / "results.json").exists()
    main(["suppression", f"--config={config}", *words])
    assert not (tmp_path / "given" / "seed-0" / "trained").exists()
    found = json.loads((tmp_path / "given" / "results.json").read_text())["methods"]
    expected = [row for row in results["methods"] if row["hook"] == HOOKS[1]]
    for row, other in zip(found, expected, strict=True):
        assert row["method"] == other["method"]
        assert row["mse"] == pytest.approx(other["mse"], rel=1e-3)
        assert row["l0"] == pytest.approx(other["l0"], rel=1e-2)


def test_bad_input_is_named(small: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting(tmp_path, HOOKS, **small)
    with pytest.raises(ValueError, match="`sae` to be a folder for each of the 2 hooks"):
        stages.given_saes([str(tmp_path)], setting)
    sae = ReLUSAE(128, 4)
    sae.source = {"hook_name": HOOKS[0]}
    folder = str(sae.save_pretrained(tmp_path / "sae"))
    with pytest.raises(ValueError, match=f"an SAE at {HOOKS[1]}.*one at {HOOKS[0]}"):
        stages.given_saes([folder, folder], setting)
    gated = str(GatedSAE(128, 4).save_pretrained(tmp_path / "gated"))
    with pytest.raises(ValueError, match="`sae` to have ReLU latents but got a GatedSAE"):
        stages.given_saes([gated, gated], setting)


# Latents.


def test_dead_latents_lie_below_the_widest_gap() -> None:
    frequency = torch.tensor([2e-1, 3e-5, 4e-3, 1e-2, 0.0, 1e-5, 2e-3])
    assert living(frequency, 100_000).tolist() == [True, False, True, True, False, False, True]


def test_a_gap_among_frequent_latents_or_of_single_firings_is_none() -> None:
    frequency = torch.tensor([0.9, 0.05, 0.02, 0.0])
    assert living(frequency, 30, rare=1e-2).tolist() == [True, True, True, False]
    counts = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0]) / 1000
    assert living(counts, 1000).tolist() == [False, True, True, True, True, True]


def test_a_scale_and_the_growth_of_a_row_are_one_factor() -> None:
    sae = ReLUSAE(3, 2)
    copied = RescaledSAE.of(sae)
    with torch.no_grad():
        copied.scale.copy_(torch.tensor([1.5, 0.5]))
        copied.W_dec[1] *= 4
    torch.testing.assert_close(learned_scaling(sae, copied), torch.tensor([1.5, 2.0]))


def test_correlations_are_of_living_latents_and_logarithms() -> None:
    g = torch.Generator().manual_seed(0)
    names = ("frequency", "strength", "scaling", "added", "cosine")
    values = torch.rand(30, len(names), generator=g, dtype=torch.float64) + 0.1
    rows = [
        dict(zip(names, v.tolist(), strict=True)) | {"alive": i % 3 > 0}
        for i, v in enumerate(values)
    ]
    found, own = associations(rows), values[[i % 3 > 0 for i in range(30)]]
    frequency, strength = own[:, 0].log10(), own[:, 1].log10()
    assert found["living"] == 20
    assert found["cosine"] == pytest.approx(own[:, 4].mean().item())
    assert found["added,log_strength"] == pytest.approx(correlation(own[:, 3], strength).item())
    expected = partial_correlation(own[:, 2], frequency, strength).item()
    assert found["scaling,log_frequency,partial"] == pytest.approx(expected)
    assert associations(rows[:1])["scaling,log_strength"] is None


# Theory.


def at_the_optimum(toy: Any, l1_coefficient: float) -> ReLUSAE:
    """Of features that never meet: each latent its feature, less half the coefficient."""
    sae = ReLUSAE(toy.d_in, toy.n_features, l1_coefficient, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_dec.copy_(toy.features)
        sae.W_enc.copy_(toy.features.T)
        sae.b_enc.fill_(-l1_coefficient / 2)
    return sae.double()


def test_at_half_the_coefficient_below_its_strength_a_feature_pulls_no_more() -> None:
    toy = theory.world(0)
    sae = at_the_optimum(toy, 1.0)
    for shift, sign in ((-0.01, -1), (0.0, 0), (0.01, 1)):  # of all activations
        moved = at_the_optimum(toy, 1.0)
        with torch.no_grad():
            moved.b_enc.add_(shift)
        moved.zero_grad()
        x = toy.sample(500, torch.Generator().manual_seed(0)).x.double()
        torch.stack([*moved.objective(x).losses.values()]).sum().backward()
        assert moved.b_enc.grad is not None
        living = toy.magnitudes > 0.5
        slopes = moved.b_enc.grad[living]
        assert (slopes * sign >= 0).all()
        assert (slopes.abs() < 1e-6).all() if sign == 0 else (slopes != 0).all()
        assert not moved.b_enc.grad[toy.magnitudes < 0.5 - 0.02].any()  # these are dead
    assert not sae.encode(0.4 * toy.features[:1].double()).any()


def test_what_is_learnt_is_measured_on_each_feature_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "_trained", lambda toy, *_: at_the_optimum(toy, 1.0).float())
    rows = theory._learnt(0, 1, 1.0)
    assert [row["learnt"] for row in rows] == pytest.approx(
        [row["predicted"] for row in rows], abs=1e-5
    )
    expected = [max(0.0, g - 0.5) for g in theory.STRENGTHS for _ in theory.FREQUENCIES]
    assert [row["predicted"] for row in rows] == pytest.approx(expected)


def test_killed_features_are_those_below_the_threshold_that_are_not_learnt() -> None:
    rows = [
        {"predicted": 0.0, "strength": 0.4, "learnt": 0.01},
        {"predicted": 0.0, "strength": 0.2, "learnt": 0.15},
        {"predicted": 0.5, "strength": 1.0, "learnt": 0.0},
    ]
    assert killed(rows) == (1, 2)


# The verdict.


def methods_with(**removed: float) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "hook": hook, "method": method, "mse_removed": value + 0.01 * sign}
        for seed in (0, 1)
        for hook, sign in (("a", 1), ("b", -1))
        for method, value in removed.items()
    ]


def test_the_order_is_compared_with_the_documents() -> None:
    there = {method: averages[0] for method, averages in AVERAGES.items()}
    assert order_in_words(methods_with(**there), "mse_removed") == (
        "decoder 0.088 > unrotated decoder 0.061 > scale 0.060 > baseline 0.002: "
        "the document's order"
    )
    other = methods_with(**{**there, "baseline": 0.07})
    assert order_in_words(other, "mse_removed").endswith(": not the document's order")
    apart = methods_with(**{**there, "scale": 0.01})
    assert order_in_words(apart, "mse_removed").endswith(": the middle two differ")


def test_the_comparison_follows_from_the_figures(results: dict[str, Any]) -> None:
    """Figures twice as large are reported twice as large."""
    rows, found, toy = results["methods"], results["correlations"], results["toy"]
    told = {what: here for what, _, here in comparison(rows, found, toy)}
    assert [list(row) for row in comparison(rows, found, toy)] == results["comparison"]
    doubled = [{**row, "mse_removed": 2 * row["mse_removed"]} for row in rows]
    again = {what: here for what, _, here in comparison(doubled, found, toy)}
    before, after = (float(each["MSE removed, decoder"]) for each in (told, again))
    assert after == pytest.approx(2 * before, abs=2e-3)
    assert told["latents that fire, encoder frozen"].startswith("differ on 0 held-out tokens")


def test_hooks_are_called_layers_where_that_tells_them_apart() -> None:
    assert list(short(HOOKS).values()) == ["layer 0", "layer 2"]
    mixed = ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"]
    assert list(short(mixed).values()) == mixed
