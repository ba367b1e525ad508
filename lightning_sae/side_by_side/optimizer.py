"""All members' optimisers as the one that Lightning knows of."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.side_by_side.member import Member


class SideBySideOptimizer(Optimizer):
    """Carries the state of the members' optimisers and schedules in a checkpoint.

    It takes no step: each member's optimiser does, when its turn comes.

    Args:
        members: The members, with their optimisers.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        super().__init__([p for member in members for p in member.sae.parameters()], {})

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of each member, in their order."""
        return {"members": [member.optimizer_state() for member in self.members]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each member its own."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_optimizer_state(state)
