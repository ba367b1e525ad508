"""Directions drawn some at a time are those drawn at once."""

import pytest
import torch

from lightning_sae.functional import directions
from lightning_sae.functional.directions import RandomUnitRows
from lightning_sae.functional.geometry import random_unit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "d"), [(100, 8), (131, 7), (257, 33), (17, 1), (3, 2), (16, 1), (1000, 128)]
)
def test_any_rows_are_those_drawn_at_once(
    rows: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, over pieces, and torch's generator is left in the same state."""
    monkeypatch.setattr(directions, "PIECE", 20 * d)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(4)
        whole, after = random_unit_rows(rows, d), torch.get_rng_state()
        torch.manual_seed(4)
        later = RandomUnitRows(rows, d)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), after)
    some = range(rows // 3, rows // 2 + 1), range(rows - 1, rows), range(1, rows, 3)
    for wanted in (range(rows), *some):
        found = later.draw(wanted)
        assert found.dtype == dtype
        assert torch.equal(found, whole[wanted.start : wanted.stop : wanted.step])
    assert torch.equal(torch.get_rng_state(), after)
