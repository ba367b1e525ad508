import pytest
import torch
from torch import Tensor

from lightning_sae.architectures.peaks import MixtureThreshold, PeakThreshold
from lightning_sae.functional.sparse.code import Code

D_SAE, WINDOW = 3, 4


def alone(tensor: Tensor, reduce_op: str) -> Tensor:
    """What a strategy with a single device does."""
    return tensor


def see(threshold: PeakThreshold, *parts: Tensor) -> None:
    threshold.open()
    for part in parts:
        threshold.note(Code.of_matrix(part))
    threshold.close(alone)


@pytest.mark.parametrize("kind", [PeakThreshold, MixtureThreshold])
def test_peaks_are_the_largest_of_the_last_batches(kind: type[PeakThreshold]) -> None:
    threshold = kind(D_SAE, 0.7, WINDOW)
    batches = [torch.rand(5, D_SAE) for _ in range(3 * WINDOW)]
    assert torch.equal(threshold.thresholds(), torch.zeros(D_SAE))
    for n, batch in enumerate(batches, start=1):
        see(threshold, batch)
        expected = torch.cat(batches[max(0, n - WINDOW) : n]).amax(0)
        assert torch.equal(threshold.peaks(), expected)
        torch.testing.assert_close(threshold.thresholds(), 0.7 * expected)


@pytest.mark.parametrize("kind", [PeakThreshold, MixtureThreshold])
def test_a_batch_in_chunks_is_one_batch_and_counts_when_it_ends(kind: type[PeakThreshold]) -> None:
    whole, chunked = kind(D_SAE, 0.7, WINDOW), kind(D_SAE, 0.7, WINDOW)
    for _ in range(6):
        batch = torch.rand(5, D_SAE)
        see(whole, batch)
        before = chunked.thresholds()
        chunked.open()
        for chunk in batch.split(2):
            chunked.note(Code.of_matrix(chunk))
            assert torch.equal(chunked.thresholds(), before)
        chunked.close(alone)
        for name, buffer in whole.named_buffers():
            assert torch.equal(buffer, chunked.get_buffer(name)), name


@pytest.mark.parametrize("kind", [PeakThreshold, MixtureThreshold])
def test_ranks_come_to_the_state_that_one_rank_has_with_all_batches(
    kind: type[PeakThreshold],
) -> None:
    one, ranks = kind(D_SAE, 0.7, WINDOW), [kind(D_SAE, 0.7, WINDOW) for _ in range(2)]

    def across(tensors: list[Tensor], reduce_op: str) -> Tensor:
        stacked = torch.stack(tensors)
        return stacked.amax(0) if reduce_op == "max" else stacked.sum(0)

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        name = "current" if reduce_op == "max" else "counted"
        return tensor.copy_(across([rank.get_buffer(name) for rank in ranks], reduce_op))

    for _ in range(2 * WINDOW):
        parts = [torch.rand(5, D_SAE) for _ in ranks]
        see(one, *parts)
        for rank, part in zip(ranks, parts, strict=True):
            rank.open()
            rank.note(Code.of_matrix(part))
        for rank in ranks:
            rank.close(reduce)
    for rank in ranks:
        assert rank.state_dict().keys() == one.state_dict().keys()
        for name, buffer in one.state_dict().items():
            torch.testing.assert_close(rank.state_dict()[name], buffer, rtol=0, atol=0)


def mixed(rows: int) -> Tensor:
    """A latent with peaks at 2 and 9, one with a peak at 6, and one that is silent."""
    high = torch.rand(rows) < 0.5
    two = torch.where(high, 9.0, 2.0) + 0.2 * torch.randn(rows)
    return torch.stack([two, 6 + 0.2 * torch.randn(rows), torch.zeros(rows)], dim=1)


def test_the_threshold_of_a_mixture_lies_between_two_peaks_and_is_the_share_for_one() -> None:
    threshold = MixtureThreshold(D_SAE, 0.7, WINDOW)
    for n in range(1, 3 * WINDOW + 1):
        see(threshold, mixed(200))
        if n < WINDOW:
            torch.testing.assert_close(threshold.thresholds(), 0.7 * threshold.peaks())
    assert threshold.has_two.tolist() == [True, False, False]
    assert 3.5 < threshold.thresholds()[0] < 7.5
    torch.testing.assert_close(threshold.thresholds()[1:], 0.7 * threshold.peaks()[1:])
    scalars = threshold.scalars()
    assert scalars["two_peaks"].item() == pytest.approx(1 / 3)
    assert scalars["separation"].item() == pytest.approx(threshold.separation.mean().item())


def test_what_a_mixture_counted_fades_with_the_window() -> None:
    threshold = MixtureThreshold(D_SAE, 0.7, WINDOW)
    ones = torch.ones(7, D_SAE)
    for n in range(6):  # the first batch has no peak to count by
        see(threshold, ones)
        by_hand = sum(7 * (1 - 1 / WINDOW) ** k for k in range(n))
        assert threshold.histogram[0, -1].item() == pytest.approx(by_hand)
        assert threshold.histogram[0, :-1].sum() == 0


def test_two_peaks_that_become_one_are_forgotten() -> None:
    threshold = MixtureThreshold(D_SAE, 0.7, WINDOW)
    for _ in range(3 * WINDOW):
        see(threshold, mixed(200))
    assert threshold.has_two[0]
    for _ in range(9 * WINDOW):
        see(threshold, mixed(200)[:, [1, 1, 2]])
    assert not threshold.has_two.any()
    torch.testing.assert_close(threshold.thresholds(), 0.7 * threshold.peaks())
