import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.sparse.memory import Workspace
from lightning_sae.functional.sparse.patterns import SparsePattern


def test_scratch_is_the_same_memory_each_time_while_it_fits() -> None:
    workspace, x = Workspace(), torch.randn(3)
    memory = workspace.scratch(6, 100, x)
    assert memory.shape == (6, 100)
    assert workspace.scratch(6, 100, x) is memory
    assert workspace.scratch(5, 100, x).shape == (5, 100)
    assert workspace.scratch(5, 100, x.double()).dtype == torch.float64


def test_memory_is_not_copied_or_pickled() -> None:
    workspace, x = Workspace(), torch.randn(3)
    memory = workspace.scratch(60, 100, x)
    gradient = torch.randn(60, 100)
    workspace.recycle([gradient])
    assert len(pickle.dumps(workspace)) < 1000
    for other in (copy.deepcopy(workspace), pickle.loads(pickle.dumps(workspace))):
        assert other.scratch(60, 100, x) is not memory
        assert other.matrix(60, 100, x).data_ptr() != gradient.data_ptr()


def test_the_memory_of_a_gradient_goes_to_one_other_of_its_kind() -> None:
    workspace = Workspace()
    row_by_row, transposed = torch.randn(4, 3), torch.randn(4, 3).T
    several = torch.zeros(1, 3).expand(4, 3)  # one number for several entries: no memory of its own
    workspace.recycle([None, torch.randn(3), row_by_row, several, transposed])
    found = [workspace.matrix(4, 3, row_by_row) for _ in range(3)]
    assert all(matrix.shape == (4, 3) and matrix.is_contiguous() for matrix in found)
    assert [m.data_ptr() for m in found[:2]] == [row_by_row.data_ptr(), transposed.data_ptr()]
    assert len({matrix.data_ptr() for matrix in found}) == 3
    assert workspace.matrix(3, 4, row_by_row).is_contiguous()
    workspace.recycle([row_by_row])
    assert workspace.matrix(4, 3, row_by_row.double()).dtype == torch.float64
    assert workspace.matrix(3, 4, row_by_row).shape == (3, 4)


VECTORS = {
    "row by row": lambda v: v,
    "transposed": lambda v: v.T.contiguous().T,
    "one row for all": lambda v: v[:1].expand_as(v),
    "with gaps": lambda v: torch.stack([v, v], -1)[..., 0],
}


@pytest.mark.parametrize("memory", VECTORS)
@pytest.mark.parametrize("active", [[], [0, 3, 5], list(range(8))])
def test_nothing_of_what_memory_held_is_left(active: list[int], memory: str) -> None:
    """Also not where a latent is active on no row, and not what is no number."""
    workspace, shape = Workspace(), (2, 4)
    used = torch.full((4, 3), torch.nan)
    workspace.recycle([used])
    pattern = SparsePattern.from_flat(torch.tensor(active, dtype=torch.int64), shape, workspace)
    weights, vectors = torch.randn(len(active)), VECTORS[memory](torch.randn(2, 3))
    expected = torch.zeros(4, 3)
    for weight, place in zip(weights, active, strict=True):
        expected[place % 4] += weight * vectors[place // 4]
    torch.testing.assert_close(pattern.sum_for_latents(weights, vectors), expected)


def test_a_gradient_in_recycled_memory_leaves_the_other_alone() -> None:
    """Both gradients of a step have the same shape; neither may be given the other's memory."""
    workspace = Workspace()
    pattern = SparsePattern.from_flat(torch.tensor([0, 3, 5]), (2, 4), workspace)
    workspace.recycle([torch.randn(4, 3), torch.randn(4, 3)])
    kept: list[Tensor] = []
    for _ in range(3):
        kept.append(pattern.sum_for_latents(torch.ones(3), torch.ones(2, 3) * (len(kept) + 1)))
    active = torch.tensor([1.0, 1.0, 0.0, 1.0]).unsqueeze(1)
    for size, gradient in enumerate(kept, start=1):
        assert torch.equal(gradient, size * active.expand(4, 3))
