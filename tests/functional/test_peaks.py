import math

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.peaks import (
    LEAST_COUNT,
    counts_by_height,
    maxima,
    otsu_split,
    two_peaks,
)
from lightning_sae.functional.sparse.code import Code, Layout, encode
from lightning_sae.functional.sparse.selection import Above

BINS = 64


def code(dense: bool, rows: int = 40, latents: int = 6) -> Code:
    """Latents, the last of which never fires."""
    layout = Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))
    b_enc = torch.zeros(latents)
    b_enc[-1] = -1e3
    return encode(torch.randn(rows, 3), torch.randn(3, latents), b_enc, Above(-0.5), layout)


@pytest.mark.parametrize("dense", [True, False])
def test_maxima_are_those_of_the_matrix_and_never_negative(dense: bool) -> None:
    f = code(dense)
    assert torch.equal(maxima(f), f.to_dense().amax(0).clamp_min(0))
    assert maxima(f)[-1] == 0
    assert torch.equal(maxima(code(dense, rows=0)), torch.zeros(6))


@pytest.mark.parametrize("dense", [True, False])
def test_counts_are_those_of_a_loop(dense: bool) -> None:
    f, tops, bins = code(dense), torch.tensor([1.0, 0.5, 3.0, 0.0, 2.0, 1.0]), 5
    expected = torch.zeros(6, bins, dtype=torch.int64)
    for row in f.to_dense():
        for j, value in enumerate(row.tolist()):
            if value > 0 and tops[j] > 0:
                expected[j, min(math.floor(value / tops[j].item() * bins), bins - 1)] += 1
    assert torch.equal(counts_by_height(f, tops, bins), expected)
    assert expected[1, -1] > 1  # some lie above the top
    assert expected[3].sum() == 0


def histogram(*parts: tuple[float, float, float]) -> Tensor:
    """Counts of a mixture of normals, each given by its weight, mean and standard deviation."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    cumulative = sum(w * torch.special.ndtr((edges - m) / s) for w, m, s in parts)
    return (cumulative[1:] - cumulative[:-1]).unsqueeze(0)  # type: ignore[index]


def crossing(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Where two weighted normal densities are equal, between their means: a quadratic's root."""
    (w, m, s), (W, M, S) = low, high
    a = 1 / (2 * s**2) - 1 / (2 * S**2)
    b = M / S**2 - m / s**2
    c = m**2 / (2 * s**2) - M**2 / (2 * S**2) + math.log(W * s / (w * S))
    roots = (
        [-c / b] if a == 0 else [(-b + k * math.sqrt(b * b - 4 * a * c)) / (2 * a) for k in (-1, 1)]
    )
    return next(root for root in roots if m < root < M)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((500, 0.3, 0.06), (500, 0.7, 0.06)),
        ((900, 0.3, 0.08), (100, 0.8, 0.05)),
        ((300, 0.2, 0.04), (700, 0.7, 0.1)),
        ((5e4, 0.35, 0.06), (5e4, 0.65, 0.08)),
    ],
)
def test_the_crossing_of_two_normals_is_the_root_of_a_quadratic(
    low: tuple[float, float, float], high: tuple[float, float, float]
) -> None:
    found = two_peaks(histogram(low, high), iterations=200)
    assert found.found.all()
    assert found.crossing.item() == pytest.approx(crossing(low, high), abs=0.5 / BINS)
    spread = math.hypot(low[2], high[2])
    expected = math.sqrt(2) * (high[1] - low[1]) / spread
    assert found.separation.item() == pytest.approx(expected, rel=0.05)
    few = two_peaks(histogram(low, high))
    assert few.crossing.item() == pytest.approx(crossing(low, high), abs=1 / BINS)


def exponential(mean: float) -> Tensor:
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return 1e4 * -(-edges / mean).exp().diff().unsqueeze(0)


@pytest.mark.parametrize(
    "one_peak",
    [
        histogram((1e4, 0.6, 0.1)),
        histogram((1e4, 0.0, 0.3)),  # half of it
        exponential(0.2),
        histogram((1e4, 0.98, 1e-4)),
        histogram((5e3, 0.40, 0.1), (5e3, 0.55, 0.1)),  # so near that they are one
        histogram((1e4, 0.2, 0.03), (50, 0.97, 0.01)),  # a few outliers
        histogram((LEAST_COUNT / 2 - 1, 0.2, 0.03), (LEAST_COUNT / 2, 0.9, 0.03)),  # too few
        torch.zeros(1, BINS),
    ],
)
def test_one_peak_is_not_taken_for_two(one_peak: Tensor) -> None:
    assert not two_peaks(one_peak).found
    assert two_peaks(one_peak).separation.isfinite()


def test_peaks_narrower_than_a_bin_have_their_crossing_between_them() -> None:
    spikes = torch.zeros(1, BINS)
    spikes[0, 10], spikes[0, 50] = 500, 500
    found = two_peaks(spikes)
    assert found.found.all()
    assert found.crossing.item() == pytest.approx((10.5 + 50.5) / 2 / BINS, abs=1e-4)


def test_latents_are_fitted_each_on_its_own() -> None:
    kinds = [
        histogram((500, 0.3, 0.06), (500, 0.7, 0.06)),
        exponential(0.2),
        histogram((0, 0.5, 0.1)),
    ]
    together = two_peaks(torch.cat(kinds))
    for j, kind in enumerate(kinds):
        for one, all_of_them in zip(two_peaks(kind), together, strict=True):
            torch.testing.assert_close(all_of_them[j : j + 1], one)


def test_the_first_split_has_the_largest_variance_between_its_halves() -> None:
    counts = torch.randint(0, 9, (20, 12)).double()
    centres = (torch.arange(12) + 0.5) / 12
    for row, split in zip(counts, otsu_split(counts).tolist(), strict=True):
        variances = []
        for k in range(1, 12):
            below, above = row[:k], row[k:]
            means = [
                (part * c).sum() / part.sum()
                for part, c in ((below, centres[:k]), (above, centres[k:]))
                if part.sum()
            ]
            between = below.sum() * above.sum() * (means[-1] - means[0]) ** 2
            variances.append(between.item())
        assert split == pytest.approx((variances.index(max(variances)) + 1) / 12)
