"""With data parallel, too, each member is what it would be alone."""

from pathlib import Path

import torch

from tests.ranks.launching import finish, said, start
from tests.side_by_side.rank import DIVERGES, NAMES


def test_members_on_two_ranks_are_what_each_is_alone_on_two_ranks(tmp_path: Path) -> None:
    assert len(NAMES) >= 6
    command = ["-m", "tests.side_by_side.rank", str(tmp_path)]
    statuses = finish(start(tmp_path, [command, command]))
    assert statuses == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["different"] == []
        assert found["stopped"] == [DIVERGES]
        # Ranks with other members say so, and do not wait for each other.
        assert f"`{NAMES[0]}.sae`: ReLUSAE, None" in found["refused"]
