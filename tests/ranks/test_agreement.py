"""Two ranks with batch B / 2 are one rank with batch B, for all architectures and callbacks."""

import pytest
import torch

from tests.ranks.cases import CASES, activations, train
from tests.ranks.conftest import OfRanks

# Runs of a few steps.
pytestmark = pytest.mark.filterwarnings("ignore:.TargetL0. did not reach its target:UserWarning")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_half_the_batch_are_one_rank(name: str, of_ranks: OfRanks) -> None:
    first, second = (results["agree"][name] for results in of_ranks.results)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    expected = train(CASES[name], activations())
    for part in ("state", "moments", "logged", "penalty_factor"):
        torch.testing.assert_close(first[part], expected[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sized", "unsized"])
@pytest.mark.parametrize(("accumulated", "expected"), [(1, 2 * 3), (2, 2 * 2)])
def test_ranks_with_unequally_many_batches_end_together(
    kind: str, accumulated: int, expected: int, of_ranks: OfRanks
) -> None:
    """In each of two epochs after as many as the rank with fewer has."""
    (steps, weights), (others_steps, others_weights) = (
        results["end_early"][f"{kind}-{accumulated}"] for results in of_ranks.results
    )
    assert steps == others_steps == expected
    assert torch.equal(weights, others_weights)
