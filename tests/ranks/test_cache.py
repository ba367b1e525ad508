"""A cache that two ranks write and train on."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_sae.data.cache.manifest import read_manifest
from lightning_sae.data.cache.writer import write_part
from tests.ranks.cases import CACHED, to_cache
from tests.ranks.conftest import OfRanks


def test_each_rank_writes_the_part_that_one_rank_would_write_for_it(
    of_ranks: OfRanks, tmp_path: Path
) -> None:
    folder, manifest = of_ranks.folder / "cache", read_manifest(of_ranks.folder / "cache")
    assert manifest.complete
    assert manifest.settings["parts"] == 2
    for part in range(2):
        write_part(
            to_cache(of_ranks.folder),
            tmp_path,
            (part, 2),
            {"held_out": 1, "training": 5},
            CACHED["shard_bytes"],
            lambda n: None,
        )
        one, other = (json.loads((f / f"part-{part}.json").read_text()) for f in (tmp_path, folder))
        assert one == other
    assert len(manifest.shards["training"]) > 4


def test_two_ranks_share_a_pass_over_it(of_ranks: OfRanks) -> None:
    files = sorted((of_ranks.folder / "cache").glob("training-*"))
    rows = torch.cat([load_file(file)["blocks.0.hook_resid_post"] for file in files])
    found = torch.cat([results["cache"]["batches"] for results in of_ranks.results])
    n = len(rows) // 64 * 32  # rows that each rank had in the first pass
    assert 0.8 * len(rows) < 2 * n < 640 == len(found)
    served = Counter(tuple(row.tolist()) for each in found.split(320) for row in each[:n])
    assert served <= Counter(tuple(row.tolist()) for row in rows)
