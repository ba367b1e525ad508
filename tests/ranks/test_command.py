"""A run of two ranks that is killed, goes on, is evaluated; and runs that are refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lightning_sae
from lightning_sae import ActivationDataModule
from lightning_sae.analysis import evaluate_in_model
from lightning_sae.cli import main
from lightning_sae.data.tokens import TokenBlocks
from tests.ranks.command import STEPS, write_config
from tests.ranks.conftest import OfRanks


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "sae" / "sae.safetensors")


def test_a_killed_rank_fails_the_run_with_a_message_and_leaves_a_checkpoint(
    folder: Path, killed: list[int | None], of_ranks: OfRanks
) -> None:
    assert killed == [1, -9]
    text = (folder / "killed-said-0").read_text()
    last = folder / "killed" / "checkpoints" / "last.ckpt"
    assert f"the checkpoint is {last}, of step 4" in text
    assert f"--ckpt_path {last}" in text
    assert "lightning-sae: Another rank ended or cannot be reached" in text
    checkpoints = folder / "alone" / "checkpoints"  # a copy of what was left
    assert sorted(path.name for path in checkpoints.iterdir() if path.name[0] != ".") == [
        "last.ckpt",
        "last.ckpt.step-4.rank-1",
    ]
    assert lightning_sae.load(checkpoints / "last.ckpt").d_sae == 256


def test_a_killed_run_that_goes_on_is_the_one_that_was_not_killed_bit_for_bit(
    folder: Path, of_ranks: OfRanks
) -> None:
    whole, resumed, bare = (weights(folder / name) for name in ("whole", "killed", "bare"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not any(torch.equal(bare[name], whole[name]) for name in whole)
    parts = folder / "killed" / "checkpoints"
    assert [path.name for path in parts.glob("*.rank-*")] == [f"last.ckpt.step-{STEPS}.rank-1"]


def test_a_rank_whose_part_is_missing_says_what_is_not_exact(of_ranks: OfRanks) -> None:
    for rank, results in enumerate(of_ranks.results):
        warned = results["go_on"]["warned"]
        lacking = [text for text in warned if "holds no buffer of rank" in text]
        assert len(lacking) == rank
        assert all(warned.index(text) > warned.index("killed") for text in lacking)


def test_going_on_with_another_number_of_ranks_says_what_is_not_exact(
    folder: Path, of_ranks: OfRanks
) -> None:
    config = write_config(folder / "alone", devices=1)
    last = folder / "alone" / "checkpoints" / "last.ckpt"
    with (
        pytest.warns(UserWarning, match="of a run of 2 ranks and goes on with 1.*have 1/2 of"),
        pytest.warns(UserWarning, match="holds no buffer of rank 0: it is of a run with another"),
    ):
        main(["fit", "--config", str(config), "--ckpt_path", str(last)])
    assert weights(folder / "alone")


class OfBothRanks(ActivationDataModule):
    """Held-out tokens of the two ranks, one after the other."""

    def held_out_tokens(self, n: int, *, equal_passes: bool = False) -> Iterator[Tensor]:
        for rank in range(2):
            blocks = TokenBlocks(
                self.corpus,
                self.encoder,
                self.context_length,
                held_out_fraction=self.validation_fraction,
                part_held_out=True,
                rank=rank,
                world_size=2,
            )
            read = blocks.read if equal_passes else blocks.read_first_epoch
            for _ in range(n // 2 // (self.blocks_per_pass * self.context_length)):
                yield read(self.blocks_per_pass)


def test_the_evaluation_is_one_of_all_held_out_documents(folder: Path, of_ranks: OfRanks) -> None:
    results = json.loads((folder / "whole" / "results.json").read_text())
    assert not (folder / "whole" / "results-2.json").exists()
    data = OfBothRanks(
        "blocks.1.hook_resid_post",
        text=folder / "text.txt",
        validation_fraction=0.3,
        context_length=32,
        blocks_per_pass=2,
        batch_size=48,
        n_test=2 * 256,
    )
    sae = lightning_sae.load(folder / "whole" / "sae")
    expected = evaluate_in_model(sae, data, 512)
    assert expected["n_tokens"] > 200
    for batch in data.test_dataloader():
        f = sae.encode(batch)
        sae.metrics.update(x=batch, x_hat=sae.decode(f), f=f)
    of_sae = sae.metrics.compute()
    of_sae.pop("frequency")
    expected |= {name: value.item() for name, value in of_sae.items()}
    assert results == pytest.approx(expected, rel=1e-4)


def test_ranks_with_different_configurations_are_refused_before_any_work(
    of_ranks: OfRanks,
) -> None:
    for results in of_ranks.results:
        assert "one configuration but, from rank 0 on, they have" in results["different"]
        assert "`model.init_args.lr`: 0.003, 0.004" in results["different"]
    assert not (of_ranks.folder / "different").exists()
