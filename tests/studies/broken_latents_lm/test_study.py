"""The study of broken latents on a language model: its rules, its figures, the command."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.sparse import csr_matrix

from lightning_sae import MatryoshkaSAE, ReLUSAE, TiedSAE, load
from lightning_sae.analysis.evaluation.figures import Questions
from lightning_sae.analysis.evaluation.passages import Blocks
from lightning_sae.analysis.evaluation.sample import Sample
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.functional.sparse.code import Code
from lightning_sae.functional.sparse.patterns import DensePattern, SparsePattern
from lightning_sae.studies import main
from lightning_sae.studies.broken_latents_lm.measure import overlaps_of, parts_of, peaks_of
from lightning_sae.studies.broken_latents_lm.report import changes, gains_in_words, noise_in_words
from lightning_sae.studies.broken_latents_lm.rules import (
    HighPeak,
    LowPeak,
    OfTwoPeaks,
    SmallPeak,
    WeakOfShare,
)
from lightning_sae.studies.broken_latents_lm.settings import (
    JUMPING,
    NESTED,
    RULES,
    TIED,
    UNTIED,
    Variant,
    variants,
)
from lightning_sae.studies.broken_latents_lm.study import broken_latents_lm

MODULE = broken_latents_lm.__module__

# Rules.

F = torch.tensor([[1.0, 1.0, 1.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])


def with_peaks(kind: type[OfTwoPeaks], **arguments: Any) -> OfTwoPeaks:
    """Three latents with a largest activation of 10: valley at 5, valley at 3, a single peak."""
    peaks = kind(3, 50, **arguments)
    peaks.recent[0] = 10.0
    peaks.shares.copy_(torch.tensor([0.5, 0.3, 1.0]))
    peaks.has_two.copy_(torch.tensor([True, True, False]))
    peaks.histogram[:, 10] = torch.tensor([60.0, 1.0, 60.0])  # about .16 of the largest
    peaks.histogram[:, 50] = 10.0
    return peaks


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LowPeak, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]),
        (HighPeak, [[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]]),
        (SmallPeak, [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]),
    ],
)
def test_a_rule_chooses_firings_of_one_peak_of_latents_that_have_two(
    kind: type[OfTwoPeaks], expected: list[list[int]]
) -> None:
    peaks = with_peaks(kind)
    found = peaks.strong(Code.of_matrix(F), scale=0.1)
    assert found.int().tolist() == expected
    where = F.flatten().nonzero().squeeze(1)
    sparse = Code(F.flatten()[where], SparsePattern.from_flat(where, (4, 3)))
    chosen = torch.tensor(expected).flatten()[where]
    assert peaks.strong(sparse, scale=0.1).int().tolist() == chosen.tolist()


def test_inner_levels_are_the_first_latents() -> None:
    found = with_peaks(LowPeak, first=1).strong(Code.of_matrix(F))
    assert found.int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_over_weak_firings_is_that_of_a_naive_loop(dense: bool) -> None:
    torch.manual_seed(0)
    sae: Any = Variant(UNTIED, 7, "weak", 2.0).sae(5, 3.0)
    assert isinstance(sae.peaks, WeakOfShare)
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.W_enc.mul_(2.0)
    x = torch.randn(11, 5)
    sae.layout.dense = dense
    f = sae.latents(x)
    assert isinstance(f.pattern, DensePattern) == dense
    latents = sae.activate(sae.pre_activations(x))
    sae.peaks.recent[0] = latents.amax(0)
    sae.eval()
    cosines = unit_rows(x) @ unit_rows(sae.W_enc.T.detach()).T
    pairs = [
        float(cosines[i, j] ** 2)
        for i in range(11)
        for j in range(7)
        if 0 < latents[i, j] <= 0.7 * latents[:, j].max()
    ]
    assert len(pairs) > 3
    assert not (sae.peaks.strong(f) & (f.values <= 0)).any()
    assert float(sae.orthogonality(x, f)["orthogonality"].detach()) == pytest.approx(
        2.0 * sum(pairs) / 77, rel=1e-5
    )


# Settings.


def test_only_the_first_width_has_all_weights() -> None:
    found = variants((16, 32), (1.0, 10.0))
    assert len({each.name for each in found}) == len(found)
    weights = {(each.d_sae, each.coefficient) for each in found}
    first = {(16, 0.0), (16, 1.0), (16, 10.0), (16, 100.0), (16, 1000.0)}
    assert weights == first | {(32, 0.0), (32, 1.0), (32, 100.0)}
    assert {(each.d_sae, each.rule) for each in found} == {
        *((16, name) for name in RULES),
        *((32, name) for name, rule in RULES.items() if rule.everywhere),
    }
    assert {each.coefficient for each in found if each.rule == "small"} == {100.0}


def test_saes_are_of_their_kind_and_begin_with_equal_rows() -> None:
    made = {}
    for kind in (UNTIED, TIED, JUMPING, NESTED):
        torch.manual_seed(3)
        made[kind] = Variant(kind, 16, "mixture", 1.0).sae(8, 2.0)
    assert [type(sae) for sae in made.values()] == [ReLUSAE, TiedSAE, TiedSAE, MatryoshkaSAE]
    assert all(torch.equal(sae.W_dec, made[UNTIED].W_dec) for sae in made.values())
    assert made[JUMPING].threshold_init is not None
    assert made[NESTED].prefixes == (1, 4, 16)


# Figures.


def test_peaks_are_counted_over_latents_that_fire_often() -> None:
    generator = torch.Generator().manual_seed(0)
    one = 5 + torch.randn(1000, generator=generator).clamp(-3, 3)
    two = torch.cat([2 + one[:500] / 50, 9 + one[500:] / 50])
    rare = torch.zeros(1000)
    rare[:50] = 1.0
    found = peaks_of(csr_matrix(torch.stack([one, two, rare], dim=1).numpy()))
    assert (found["two_peaks"], found["dips"]) == (0.5, 0.5)
    assert found["below_valley"] == pytest.approx(0.5)
    assert peaks_of(csr_matrix(rare[:, None].numpy()))["two_peaks"] is None


@torch.no_grad()
def test_the_parts_of_the_loss_are_those_of_a_naive_loop() -> None:
    torch.manual_seed(1)
    sae = ReLUSAE(4, 6).eval()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    x = torch.randn(30, 4)
    found = parts_of(sae, x)
    f, sums = sae.encode(x), dict.fromkeys(("silent", "weak", "opposite"), 0.0)
    for i in range(30):
        for j in range(6):
            a, w = x[i] - sae.b_dec, sae.W_enc[:, j]
            cosine = float(a @ w / a.norm() / w.norm())
            if f[i, j] <= 0:
                sums["silent"] += cosine**2
                sums["opposite"] += cosine**2 * (cosine < 0)
            elif f[i, j] <= 0.7 * f[:, j].max():
                sums["weak"] += cosine**2
    total = sums["silent"] + sums["weak"]
    assert found["cos2"] == pytest.approx(total / 180, rel=1e-4)
    assert found["of_silent"] == pytest.approx(sums["silent"] / total, rel=1e-4)
    assert found["of_weak"] == pytest.approx(sums["weak"] / total, rel=1e-4)
    assert found["opposite"] == pytest.approx(sums["opposite"] / total, rel=1e-4)


def labelled(labels: Sequence[int]) -> tuple[Sample, Questions]:
    """A sample of tokens of one block, and their labels for the property `p`."""
    n = len(labels)
    at = torch.arange(n)
    sample = Sample(torch.zeros(n, 2), torch.zeros(n, 2), "", at, torch.zeros_like(at), at)
    blocks = Blocks(at[None], torch.zeros(1, dtype=torch.int64), at[None])
    tested, one = torch.zeros(n, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    return sample, Questions(blocks, {"p": torch.tensor(labels)}, {}, tested, one, {})


def test_activations_of_a_property_are_told_apart_by_its_label() -> None:
    f = torch.tensor([10.0, 10.0, 1.0, 0.0, 1.0, 0.0, 0.0, 99.0])
    sample, questions = labelled([1, 1, 1, 1, 0, 0, 0, -1])
    absorbed = {"p": {"latents": [1, 0], "fraction": 0.25, "full": 0.5}}
    (row,) = overlaps_of(
        csr_matrix(torch.stack([torch.ones(8), f], dim=1).numpy()), absorbed, sample, questions
    ).values()
    assert (row["latent"], row["fraction"], row["full"], row["top"]) == (1, 0.25, 0.5, 10.0)
    assert (row["fires_with"], row["of_property"]) == (0.75, 0.75)
    assert row["fires_without"] == pytest.approx(1 / 3)
    assert (row["of_low"], row["of_top"]) == (0.5, 1.0)
    assert row["overlap"] == pytest.approx(1 / 3)  # a third of the firings with it is at 1
    assert (sum(row["with_property"]), sum(row["without"])) == (3, 1)


def row(rule: str, absorbed: float, added: float) -> dict[str, Any]:
    base = {"sae": rule, "kind": TIED, "d_sae": 8, "seed": 0, "rule": rule}
    return {**base, "absorbed": absorbed, "ce_added": added}


def test_gains_are_counted_against_the_same_seed() -> None:
    rows = [row("none", 0.3, 1.0), row("share", 0.2, 2.0), row("low", 0.1, 0.5)]
    (words,) = gains_in_words([*rows, row("weak", 0.4, 0.1)])
    assert "of 3 SAEs with the loss" in words
    assert "2 have less absorption" in words
    assert "1 of these add no more" in words


def test_changes_are_against_the_same_seed() -> None:
    of_two = [row("none", 0.3, 1.0), row("share", 0.2, 2.0)]
    other = [each | {"seed": 1, "absorbed": each["absorbed"] / 2} for each in of_two]
    found = list(changes([*of_two, *other]))
    assert [each["absorbed"] for each in found] == pytest.approx([-0.1, -0.05])
    assert [each["ce_added"] for each in found] == [1.0, 1.0]
    assert found[0]["fvu"] is None


def test_the_noise_of_absorption_is_that_of_saes_with_the_same_cost() -> None:
    rows = [row("none", 0.3, 1.0), row("low", 0.2, 1.001), row("share", 0.0, 2.0)]
    (words,) = noise_in_words(rows)
    assert "1 pairs" in words
    assert "up to 0.100" in words
    assert not list(noise_in_words(rows[1:]))


# The command.


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any]) -> Path:
    """A run with three SAEs, on documents of a few functions each."""
    folder = tmp_path_factory.mktemp("broken")
    text = "".join(Path(small[name]).read_text() for name in ("text", "validation_text"))
    documents = text.split("\n\n")
    sixth = len(documents) // 6
    parts = ["\n\n".join(documents[n * sixth : (n + 1) * sixth]) for n in range(6)]
    (folder / "text.txt").write_text("<|endoftext|>".join(parts))
    given = {**small, "text": folder / "text.txt", "validation_text": folder / "text.txt"}
    given |= {"widths": [16], "coefficients": [50], "l0": 4, "probe_tokens": 1024, "seeds": 1}
    del given["d_sae"]
    words = [f"--{name}={value}" for name, value in given.items()]
    chosen = [
        Variant(UNTIED, 16),
        Variant(TIED, 16, "share", 50.0),
        Variant(NESTED, 16, "inner-high", 50.0),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[MODULE], "variants", lambda *_: chosen)
        main(["broken-latents-lm", f"--output={folder / 'new'}", *words])
    return folder / "new"


def test_each_sae_has_its_figures_and_is_read_as_one_of_the_package(output: Path) -> None:
    rows = list(csv.DictReader((output / "saes.csv").read_text().splitlines()))
    assert [row["rule"] for row in rows] == ["none", "share", "inner-high"]
    for row in rows:
        assert float(row["fvu"]) > 0
        assert 0 <= float(row["of_silent"]) <= 1
        sae = load(output / "seed-0" / "saes" / row["sae"])
        assert sae.d_sae == 16


def test_the_report_has_pictures(output: Path) -> None:
    assert "data:image/png" in (output / "report.html").read_text()
    for name in ("cost.png", "histograms.png"):
        assert (output / name).stat().st_size > 5_000
    found = json.loads((output / "results.json").read_text())
    assert found["settings"]["widths"] == [16]


@pytest.mark.parametrize("argument", ["--widths=[32,16]", "--coefficients=[0]", "--l0=0"])
def test_what_cannot_be_is_refused(argument: str, tmp_path: Path, words: Sequence[str]) -> None:
    common = [word for word in words if not word.startswith("--d_sae")]
    with pytest.raises(ValueError, match="widths|coefficients|l0"):
        main(["broken-latents-lm", f"--output={tmp_path / 'a'}", *common, argument])
