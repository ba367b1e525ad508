"""`lightning-sae import` and `lightning-sae export`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sae
from lightning_sae import BatchTopKSAE, ReLUSAE
from lightning_sae.commands.import_export import export_main, import_main
from lightning_sae.interop import FORMATS, export


def test_an_sae_goes_out_and_comes_back(
    sae_of: Callable[..., Any], x: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = sae_of("topk")
    own = sae.save_pretrained(tmp_path / "own")
    there, here = tmp_path / "there", tmp_path / "here"
    export_main([str(own), "--format", "sparsify", "--output", str(there)])
    import_main([str(there), "--output", str(here)])
    said = capsys.readouterr().out
    assert f"Made: {there}  for sparsify, on raw activations" in said
    assert "Read TopKSAE, 6 wide, 20 latents, from sparsify; units of its latents: raw" in said
    assert said.endswith(f"Made: {here}  for lightning_sae.load\n")
    torch.testing.assert_close(lightning_sae.load(here).encode(x), sae.encode(x))
    with pytest.raises(ValueError, match="`path` to be a new or empty folder"):
        export_main([str(own), "--format", "saelens", "--output", str(there)])
    with pytest.raises(ValueError, match="`format` to be one of .*'saelens'"):
        export_main([str(own), "--format", "safetensors", "--output", str(tmp_path / "x")])


def test_a_file_of_weights_stands_for_its_folder(
    sae_of: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    sae = sae_of("gated")
    folder = export(sae, tmp_path / "there", "saelens")
    found = lightning_sae.load(folder / "sae_weights.safetensors")
    torch.testing.assert_close(found.encode(x), sae.encode(x))


def test_what_was_guessed_is_shown(
    sae_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(sae_of("relu"), tmp_path / "there", "openai")
    import_main([str(folder / "autoencoder.pt"), "--output", str(tmp_path / "here")])
    assert "Guessed:" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["nothing", "a file", "others"])
def test_the_error_for_other_files_names_the_contents_and_known_formats(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "there"
    if content != "nothing":
        path.mkdir()
        (path / "model.bin").touch()
    message = "exist" if content == "nothing" else "model.bin"
    with pytest.raises(ValueError, match=rf"holds .*{message}(?s:.*)") as refused:
        lightning_sae.load(path)
    known = [format.files for name, format in FORMATS.items() if name != "openai_normalised"]
    assert all(files in str(refused.value) for files in known)


@pytest.mark.parametrize("name", ["relu", "batch topk", "jumprelu", "gated", "matryoshka"])
def test_an_imported_sae_is_trained_on_and_saved(
    name: str, sae_of: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    folder = export(sae_of(name), tmp_path / "there", "dictionary_learning")
    sae = lightning_sae.load(folder)
    before, theirs = sae.W_dec.detach().clone(), dict(sae.source["imported"])
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(sae.train(), DataLoader(x, batch_size=50))  # type: ignore[arg-type]
    moved = (sae.W_dec - before).abs().max()
    assert 0 < moved < 2.1 * sae.lr  # two steps of Adam: rows keep the norms that they had
    again = lightning_sae.load(sae.save_pretrained(tmp_path / "here"))
    torch.testing.assert_close(again(x), sae(x))
    assert again.source["imported"] == theirs


def test_a_class_of_a_users_own_is_refused(tmp_path: Path) -> None:
    class Doubled(ReLUSAE):
        def activate(self, pre: Tensor) -> Tensor:
            return 2 * pre.relu()

    with pytest.raises(ValueError, match=r"`Doubled` computes its own Doubled.activate|Doubled"):
        export(Doubled(4, 6), tmp_path / "out", "saelens")


def test_an_untrained_batch_top_k_lets_all_through(x: Tensor, tmp_path: Path) -> None:
    sae = BatchTopKSAE(6, 20, k=3)
    back = lightning_sae.load(export(sae, tmp_path / "out", "saelens"))
    torch.testing.assert_close(back.encode(x), sae.encode(x))


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    sae = ReLUSAE(4, 6)
    with torch.no_grad():
        sae.b_enc[2] = torch.nan
    with pytest.raises(ValueError, match="not exported, for b_enc are not finite"):
        export(sae, tmp_path / "out", "saelens")
    assert not (tmp_path / "out").exists()
