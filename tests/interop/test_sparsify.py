"""sparsify's folders, against its forward pass written out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lightning_sae
from lightning_sae.interop import export

D_IN, D_SAE = 6, 20


def forward(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    config = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae.safetensors")
    assert (config["activation"], config["transcode"]) == ("topk", False)
    assert w["encoder.weight"].shape == (config["num_latents"], config["d_in"])
    pre = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    values, places = pre.topk(config["k"])
    f = torch.zeros_like(pre).scatter(-1, places, values)
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_written_computes_the_same_there_and_back(
    scaled: bool,
    subtracts: bool,
    sae_of: Callable[..., Any],
    there_and_back: Callable[..., tuple[Path, Any]],
) -> None:
    sae = sae_of("topk", scaled, apply_b_dec_to_input=subtracts)
    folder, back = there_and_back(sae, "sparsify", forward, "layers.3")
    assert back.source["hook_name"] == sae.source["hook_name"]
    folded = json.loads((folder / "cfg.json").read_text())["lightning_sae"]["folded"]
    assert len(folded) == scaled + (not subtracts)


@pytest.fixture
def theirs(sae_of: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as sparsify would, with a run's description above it."""

    def theirs(name: str, **config: Any) -> Path:
        folder = export(sae_of("topk"), tmp_path / "run" / name, "sparsify")
        own = json.loads((folder / "cfg.json").read_text())
        del own["lightning_sae"]
        (folder / "cfg.json").write_text(json.dumps({**own, **config}))
        run = {"model": "org/model", "dataset": "org/text", "ctx_len": 2048}
        (folder.parent / "config.json").write_text(json.dumps(run))
        return folder

    return theirs


def test_the_run_above_says_where_it_is_from(theirs: Callable[..., Path]) -> None:
    source = lightning_sae.load(theirs("layers.5.mlp", num_latents=0, expansion_factor=3)).source
    assert source.pop("imported")["hookpoint"] == "layers.5.mlp"
    assert source == {
        "model": "org/model",
        "text": "org/text",
        "context_length": 2048,
        "hook_name": "blocks.5.hook_mlp_out",
    }


def test_a_hookpoint_without_a_name_warns(theirs: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match=r"at no hook in particular, .* name, layers.5.q_proj"):
        assert "hook_name" not in lightning_sae.load(theirs("layers.5.q_proj")).source


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "`transcode` is true: it predicts the output of a module"),
        ({"skip_connection": True}, "a linear path around the latents"),
        ({"activation": "groupmax"}, "`activation` is 'groupmax'.* largest latent of each group"),
        ({"num_latents": 40}, "`num_latents` is 40 but the weights are 20 wide"),
        ({"k": 30}, "`k` to be above 0 and at most `d_sae`=20"),
    ],
)
def test_what_no_sae_here_computes_is_refused(
    config: dict[str, Any], message: str, theirs: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=rf"^Could not read .*{message}"):
        lightning_sae.load(theirs("layers.0", **config))


def test_a_transposed_decoder_is_refused(theirs: Callable[..., Path]) -> None:
    folder = theirs("layers.0")
    w = load_file(folder / "sae.safetensors")
    save_file({**w, "W_dec": w["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(
        ValueError, match="its decoder has d_in=20 and d_sae=6, and W_enc is of shape"
    ):
        lightning_sae.load(folder)


def test_other_architectures_are_refused_with_the_nearest_format(
    sae_of: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot hold this GatedSAE.*The nearest: `saelens`"):
        export(sae_of("gated"), tmp_path / "out", "sparsify")
