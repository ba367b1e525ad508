"""`lightning-sae analyze` by two ranks."""

from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from lightning_sae import FeatureStore
from lightning_sae.analysis.analyze import analyze
from lightning_sae.analysis.store import CONTEXTS, LATENTS
from tests.ranks.cases import to_analyze
from tests.ranks.conftest import OfRanks


def test_two_ranks_find_what_one_finds(of_ranks: OfRanks, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    analyze(str(to_analyze(of_ranks.folder)), str(alone), tokens=4096, accelerator="cpu")
    one, two = FeatureStore(alone), FeatureStore(of_ranks.folder / "analysis")
    assert one.results["tokens"] > 3000
    pd.testing.assert_frame_equal(one.table, two.table, rtol=1e-5)
    expected, found = ({**store.results, "seconds": 0} for store in (one, two))
    figures = ("tokens", "left_out", "l0", "dead", "source")
    assert {name: found[name] for name in figures} == {name: expected[name] for name in figures}
    for name in (CONTEXTS, LATENTS):
        of_one, of_two = load_file(one.folder / name), load_file(two.folder / name)
        for key, value in of_one.items():
            assert value.shape == of_two[key].shape, key
            assert (value.float() - of_two[key].float()).nan_to_num().abs().max() < 1e-4, key
