"""With data parallel, too, each member is what it would be alone."""

import torch

from tests.ranks.conftest import OfRanks
from tests.ranks.side_by_side import DIVERGES, NAMES


def test_members_on_two_ranks_are_what_each_is_alone_on_two_ranks(of_ranks: OfRanks) -> None:
    assert len(NAMES) >= 6
    for results in of_ranks.results:
        found = results["side_by_side"]
        for name in NAMES:
            alone, own = results["agree"][name]["state"], found["weights"][name]
            assert all(torch.equal(own[key], value) for key, value in alone.items()), name
        assert found["stopped"] == [DIVERGES]
        # Ranks with other members say so, and do not wait for each other.
        assert f"`{NAMES[0]}.sae`: ReLUSAE, None" in found["refused"]
