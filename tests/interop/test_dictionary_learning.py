"""dictionary_learning's folders, against its forward passes written out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_sae
from lightning_sae.interop import export
from tests.interop.conftest import KINDS, own_source, stated

D_IN, D_SAE = 6, 20


def forward(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, as the `dict_class` computes them without normalising rows."""
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    w = torch.load(folder / "ae.pt", weights_only=True)
    if "encoder.weight" in w:
        W, D = w["encoder.weight"].T, w["decoder.weight"].T
    else:
        W, D = w["W_enc"], w["W_dec"]
    bias = w[BIAS[kind]]
    xc = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - bias
    if kind == "GatedAutoEncoder":
        u = xc @ W
        f = (u + w["gate_bias"] > 0) * (w["r_mag"].exp() * u + w["mag_bias"]).relu()
        return f, f @ D + bias
    pre = (xc @ W + w.get("encoder.bias", w.get("b_enc"))).relu()
    if kind == "AutoEncoderTopK":
        values, places = pre.topk(int(w["k"]))
        pre = torch.zeros_like(pre).scatter(-1, places, values)
    elif "threshold" in w:
        pre = pre * (pre > w["threshold"])
    return pre, pre @ D + bias


BIAS = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
    "JumpReluAutoEncoder": "b_dec",
}
DICT_CLASSES = {
    "relu": "AutoEncoder",
    "relu, no centring": "AutoEncoderNew",
    "topk": "AutoEncoderTopK",
    "batch topk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "matryoshka, random": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_computes_the_same_there_and_back(
    name: str,
    scaled: bool,
    sae_of: Callable[..., Any],
    there_and_back: Callable[..., tuple[Path, Any]],
) -> None:
    sae = sae_of(name, scaled)
    folder, back = there_and_back(sae, "dictionary_learning", forward)
    assert own_source(back) == stated()
    written = json.loads((folder / "config.json").read_text())
    assert written["trainer"]["dict_class"] == DICT_CLASSES.get(
        name, written["trainer"]["dict_class"]
    )
    assert type(back).__name__ == type(sae).__name__ or name not in DICT_CLASSES or "random" in name


def test_changes_by_its_own_loader_are_reported(sae_of: Callable[..., Any], tmp_path: Path) -> None:
    for unit in (False, True):
        folder = export(sae_of("relu"), tmp_path / str(unit), "dictionary_learning", unit)
        said = json.loads((folder / "config.json").read_text())["lightning_sae"]["folded"]
        assert any("normalize_decoder=False" in note for note in said) is not unit


def change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the tensors as changed."""
    content = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(change(content), folder / "ae.pt")


@pytest.mark.parametrize("name", ["batch topk", "matryoshka", "gated", "topk", "relu"])
def test_the_backup_of_a_run_is_scaled_back(
    name: str,
    sae_of: Callable[..., Any],
    x: Tensor,
    assert_same: Callable[..., None],
    tmp_path: Path,
) -> None:
    sae = sae_of(name, scaled=False)
    folder = export(sae, tmp_path / "out", "dictionary_learning")
    latents, x_hat = forward(folder, x / 3)  # what the run computes of x / norm_factor
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    change(folder, lambda ae: {"ae": ae, "norm_factor": 3.0, "step": 7, "config": trainer})
    (folder / "config.json").unlink()
    back = lightning_sae.load(folder)
    assert_same((back.encode(x), back(x)), (3 * latents, 3 * x_hat))


def test_a_threshold_that_was_never_set_lets_all_through(
    sae_of: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    folder = export(sae_of("batch topk"), tmp_path / "out", "dictionary_learning")
    change(folder, lambda ae: {**ae, "threshold": torch.tensor(-1.0)})
    with pytest.warns(UserWarning, match="taken no threshold, for it has none"):
        back: Any = lightning_sae.load(folder)
    assert back.threshold == -torch.inf
    assert torch.equal(back.encode(x), forward(folder, x)[0])
    again = export(back, tmp_path / "again", "dictionary_learning")
    assert torch.load(again / "ae.pt", weights_only=True)["threshold"] == -1


@pytest.mark.parametrize("name", DICT_CLASSES)
def test_tensors_without_description_are_known_by_their_names(
    name: str, sae_of: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    sae = sae_of(name)
    folder = export(sae, tmp_path / "out", "dictionary_learning")
    (folder / "config.json").unlink()
    if name == "topk":
        with pytest.warns(UserWarning, match=r"an AutoEncoderTopK.*`architecture=BatchTopKSAE`"):
            back = lightning_sae.load(folder)
    else:
        kind = lightning_sae.BatchTopKSAE if DICT_CLASSES[name] == "BatchTopKSAE" else None
        back = lightning_sae.load(folder, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(back.encode(x), sae.encode(x))


def test_one_of_a_runs_checkpoints_is_a_file(
    sae_of: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    sae = sae_of("gated")
    folder = export(sae, tmp_path / "out", "dictionary_learning")
    path = (folder / "ae.pt").rename(tmp_path / "ae_1000.pt")
    torch.testing.assert_close(lightning_sae.load(path).encode(x), sae.encode(x))


def test_several_trainers_are_named(sae_of: Callable[..., Any], tmp_path: Path) -> None:
    for i in range(2):
        export(sae_of("relu"), tmp_path / "run" / f"trainer_{i}", "dictionary_learning")
    with pytest.raises(
        ValueError, match=r"holds trainer_0/, trainer_1/; SAEs are in trainer_0, tr"
    ):
        lightning_sae.load(tmp_path / "run")


def test_k_that_is_not_whole_has_a_nearest_format(
    sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"its `k` is 2.5.*The nearest: `saelens`"):
        export(sae_of("batch topk", k=2.5), tmp_path / "out", "dictionary_learning")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "`dict_class` is 'IdentityDict'"),
        ({"dict_size": 2048}, "`dict_size` is 2048 but the weights are 20 wide"),
    ],
)
def test_a_description_of_something_else_is_refused(
    trainer: dict[str, Any], message: str, sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = export(sae_of("topk"), tmp_path / "out", "dictionary_learning")
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= trainer
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        lightning_sae.load(folder)


def test_a_site_that_it_does_not_name_is_guessed(
    sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = export(sae_of("topk"), tmp_path / "out", "dictionary_learning")
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["submodule_name"] = None
    del config["lightning_sae"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="the residual stream after layer 3"):
        sae = lightning_sae.load(folder)
    assert sae.source["hook_name"] == "blocks.3.hook_resid_post"


def test_an_sae_in_bfloat16_goes_out_without_the_loss_of_a_digit(
    sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    sae = sae_of("jumprelu").to(torch.bfloat16)
    expected = (sae.threshold / sae.input_scale).detach()  # float32, as the SAE keeps it
    folder = export(sae, tmp_path / "out", "dictionary_learning")
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    torch.testing.assert_close(tensors["threshold"], expected, rtol=1e-6, atol=0)
    assert not torch.equal(expected, expected.bfloat16().float())
