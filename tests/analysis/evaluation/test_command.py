"""`lightning-sae evaluate` on small SAEs of the model that comes with the package."""

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from scipy.sparse import csr_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_sae import ActivationDataModule, ReLUSAE, TopKSAE, load
from lightning_sae.analysis.evaluation import command, hparams
from lightning_sae.analysis.evaluation.command import evaluate, function_of, names_of
from lightning_sae.analysis.evaluation.figures import _require_finite, _stability
from lightning_sae.analysis.evaluation.table import flat, over_seeds

HOOK, LENGTH, TOKENS = "blocks.1.hook_resid_post", 32, 2048
OWN = """
def has_underscore(passage):
    return ["_" in piece for piece in passage.pieces]
"""


def saved(sae: Any, folder: Path, **source: Any) -> str:
    sae.source = {"model": "embedded", "hook_name": HOOK, "text": "embedded"}
    sae.source |= {"context_length": LENGTH, "drop_special_tokens": True, **source}
    return str(sae.save_pretrained(folder))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three SAEs, two of one kind, and their evaluation by the command."""
    root = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    names = ("relu-0", "relu-1", "topk")
    saes = (ReLUSAE(128, 24), ReLUSAE(128, 24), TopKSAE(128, 32, k=8))
    with torch.no_grad():
        for sae in saes[:2]:
            sae.b_enc.fill_(-1.0)
            sae.b_enc[-1] = -1e6
    paths = [saved(sae, root / n / "sae") for n, sae in zip(names, saes, strict=True)]
    (root / "own.py").write_text(OWN)
    own = json.dumps([f"{root / 'own.py'}:has_underscore"])
    sizes = ["--tokens", str(TOKENS), "--probe_tokens", "8000", "--device", "cpu"]
    output = ["--output", str(root / "out"), "--properties", own]
    command.main([*paths, *output, *sizes])
    return root


@pytest.fixture(scope="module")
def evaluation(root: Path) -> dict:
    return json.loads((root / "out" / "evaluation.json").read_text())


def test_the_figures_of_a_test_are_those_of_test(root: Path, evaluation: dict) -> None:
    sae = load(root / "relu-0" / "sae")
    data = ActivationDataModule(HOOK, context_length=LENGTH, n_test=TOKENS)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (expected,) = trainer.test(sae, data, verbose=False)
    held_out = evaluation["saes"][0]["figures"]["held_out"]
    for name, value in expected.items():
        assert held_out[name.removeprefix("test/")] == pytest.approx(value, rel=1e-5)
    assert {"ce_clean", "ce_spliced", "loss_recovered_zero", "kl"} <= held_out.keys()


def test_every_figure_is_there_for_every_sae(evaluation: dict) -> None:
    reference = evaluation["references"][0]
    assert reference["neurons_at"] == "blocks.1.mlp.hook_post"
    assert "has_underscore" in reference["probing"]
    assert "keyword" in reference["probing"]
    for result in evaluation["saes"]:
        figures = result["figures"]
        assert figures["probing"].keys() == reference["probing"].keys()
        for probed in figures["probing"].values():
            assert all(0 <= probed[f"latents_{k}"] <= 1 for k in (1, 2, 5))
        for found in figures["absorption"].values():
            assert found["probe_f1"] >= 0.6
            assert 0 <= found["full"] <= 1
            assert 0 <= found["fraction"] <= 1
    # The whole activation tells more than five latents of random SAEs do.
    whole = [p["activation"] for p in reference["probing"].values()]
    five = [p["latents_5"] for p in evaluation["saes"][0]["figures"]["probing"].values()]
    assert sum(whole) > sum(five)


def test_a_copy_of_an_sae_is_no_second_seed() -> None:
    a, b = TopKSAE(8, 32, k=2), TopKSAE(8, 32, k=2)
    pairs = _stability({"a": a, "copy": copy.deepcopy(a), "b": b}, seed=0)
    assert {name: [pair["with"] for pair in found["pairs"]] for name, found in pairs.items()} == {
        "a": ["b"],
        "copy": ["b"],
        "b": ["a", "copy"],
    }


def test_stability_is_between_saes_of_one_kind(evaluation: dict) -> None:
    pairs = {r["name"]: r["figures"]["stability"]["pairs"] for r in evaluation["saes"]}
    assert [p["with"] for p in pairs["relu-0"]] == ["relu-1"]
    assert [p["with"] for p in pairs["relu-1"]] == ["relu-0"]
    assert pairs["topk"] == []
    (pair,) = pairs["relu-0"]
    assert pair["decoder_mean"] == pytest.approx(pair["random_mean"], abs=0.03)


def test_all_forms_hold_the_same_figures(root: Path, evaluation: dict) -> None:
    table = pd.read_csv(root / "out" / "evaluation.csv")
    assert table["name"].tolist() == ["relu-0", "relu-1", "topk"]
    for (_, row), result in zip(table.iterrows(), evaluation["saes"], strict=True):
        figures = flat(result["figures"])
        assert all(row[name] == pytest.approx(value) for name, value in figures.items())
        assert all(isinstance(value, float) for value in figures.values())
    text = (root / "out" / "evaluation.md").read_text()
    assert f"| {table['l0'][0]:.1f} |" in text
    assert "| the whole activation |" in text
    assert (root / "out" / "evaluation.png").stat().st_size > 10_000


def test_tensorboard_has_a_run_for_each_sae_with_its_figures(root: Path, evaluation: dict) -> None:
    for result in evaluation["saes"]:
        run = root / "out" / "tensorboard" / result["name"]
        events = EventAccumulator(str(run)).Reload()
        figures = flat(result["figures"])
        assert set(events.Tags()["scalars"]) == set(figures)
        for name, value in figures.items():
            assert events.Scalars(name)[0].value == pytest.approx(value)
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        shown = HParamsPluginData.FromString(content).session_start_info.hparams
        assert shown["architecture"].string_value == result["architecture"]
        assert shown["d_sae"].number_value == result["d_sae"]


@pytest.mark.parametrize("name", ["/somewhere/a/sae", "../a/sae", "a/sae"])
def test_paths_as_names_stay_inside_tensorboards_folder(name: str, tmp_path: Path) -> None:
    about = dict.fromkeys(hparams.ABOUT, "x")
    outside = tmp_path / "outside"
    hparams.write_hparams(outside / "in", [{"name": name, **about}], [{"l0": 1.0}])
    assert [path.name for path in outside.iterdir()] == ["in"]
    assert len([*(outside / "in").rglob("sae/events*")]) == 1


def test_saes_that_differ_in_their_seeds_have_a_mean_and_a_spread(
    root: Path, evaluation: dict
) -> None:
    text = (root / "out" / "evaluation.md").read_text()
    first, _, second = text.partition("\n\n")
    assert "| relu-1 |" in first
    heading, _, *rows = second.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| relu", "2"]]
    cell = dict(zip(heading.split(" | "), rows[0].split(" | "), strict=True))["FVU"]
    a, b = (result["figures"]["held_out"]["fvu"] for result in evaluation["saes"][:2])
    half = abs(a - b) / 2
    expected = [f"{(a + b) / 2:.3f}".lstrip("0"), f"{half * 2**0.5:.3f}".lstrip("0")]
    assert cell.split(" ± ") == expected
    assert over_seeds([evaluation["saes"][0] | {"figures": alone(evaluation)}]) == ""


def alone(evaluation: dict) -> dict:
    """Figures of an SAE that was evaluated without another of its kind."""
    return evaluation["saes"][0]["figures"] | {"stability": {"pairs": []}}


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ({}, {"output": "."}, "`output` to be a new or empty folder"),
        ({"model": "toy"}, {}, "to name a language model"),
        ({"hook_name": None}, {}, "give `hook_name`"),
        ({}, {"hook_name": "blocks.1.mlp.hook_post"}, "a hook of width 128"),
        ({}, {"probe_tokens": 0}, "`probe_tokens` to be positive"),
        ({}, {"validation_fraction": 1e-9}, "at least 4 held-out documents"),
        ({}, {"label_column": "topic", "probe_tokens": 4000}, "`label_column`"),
        ({}, {"properties": ["own.py:missing"]}, "`module:function`"),
        ({}, {"properties": "own.py:missing"}, "`module:function`"),
        ({}, {"properties": ["own.py:always"], "probe_tokens": 4000}, "`always` with"),
        ({}, {"properties": ["own.py:always", "own:always"]}, "functions of different names"),
        ({}, {"curve": "none.json"}, "there is no none.json"),
        ({}, {"output": "own.py/out"}, "`output` to be a folder that can be made"),
        ({}, {"validation_fraction": 2.0}, "`validation_fraction` to be from 0 to 1"),
        ({}, {"seed": 10**20}, "`seed` to be from 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_any_work(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: dict,
    arguments: dict,
    message: str,
) -> None:
    sae = load(root / "relu-0" / "sae")
    path = saved(sae, Path("other"), **source)
    Path("own.py").write_text("def always(passage):\n    return [True] * len(passage.pieces)\n")

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun to work")

    monkeypatch.setattr(command, "evaluate_saes", worked)
    with pytest.raises(ValueError, match=message):
        evaluate([path], **{"output": "out", **arguments})
    assert not Path("out").exists()


def test_saes_have_short_names_where_these_tell_them_apart() -> None:
    assert names_of(["runs/a/sae", "runs/b/sae-2", "c"]) == ["a", "b", "c"]
    assert names_of(["x/a/sae", "y/a/sae", "z/b/sae"]) == ["x/a/sae", "y/a/sae", "b"]
    with pytest.raises(ValueError, match="name each once"):
        names_of(["a", "a"])


def test_one_property_needs_no_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def noted(names: list[str]) -> None:
        asked.append(names)
        raise ValueError("noted")

    monkeypatch.setattr(command, "functions_of", noted)
    for words in ("own.py:f", "[own.py:f, own.py:g]"):
        with pytest.raises(ValueError, match="noted"):
            command.main(["sae", "--output", "out", "--properties", words])
    assert asked == [["own.py:f"], ["own.py:f", "own.py:g"]]


def test_one_curve_is_not_read_for_two_models() -> None:
    command._require_one_model(["gpt", "gpt"])
    with pytest.raises(ValueError, match="SAEs of gpt, llama: evaluate those of each model alone"):
        command._require_one_model(["gpt", "gpt", "llama"])


def test_saes_trained_for_different_lengths_are_no_seeds_of_each_other() -> None:
    saes = {"short": TopKSAE(8, 32, k=2), "long": TopKSAE(8, 32, k=2), "again": TopKSAE(8, 32, k=2)}
    saes["short"].n_trained = 100
    pairs = {name: found["pairs"] for name, found in _stability(saes, seed=0).items()}
    assert pairs["short"] == []
    assert [pair["with"] for pair in pairs["long"]] == ["again"]


def test_latents_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="those of a are not on this text"):
        _require_finite("a", csr_matrix([[0.0, float("inf")]]))


def test_ctrl_c_ends_in_a_line_and_writes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_saes", interrupted)
    with pytest.raises(SystemExit) as ended:
        command.main([str(root / "topk" / "sae"), "--output", "out", "--probe_tokens", "4000"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("Stopped. Nothing was written.\n")
    assert not Path("out").exists()


def test_an_sae_with_all_latents_dead_has_no_absorption(root: Path) -> None:
    sae = ReLUSAE(128, 16)
    sae.b_enc.data.fill_(-1e6)
    path = saved(sae, Path("dead") / "sae")
    folder = evaluate([path], "out", tokens=TOKENS, probe_tokens=4000, device="cpu")
    (result,) = json.loads((folder / "evaluation.json").read_text())["saes"]
    assert result["figures"]["absorption"] == {}
    assert flat(result["figures"])["dead_fraction"] == 1.0


def test_functions_are_found_in_modules_too() -> None:
    assert function_of("json:dumps") is json.dumps
    Path("open.py").write_text("def f(:")
    Path("raises.py").write_text("raise RuntimeError('at import')")
    with pytest.raises(ValueError, match="raises.py:f: RuntimeError: at import"):
        function_of("raises.py:f")
    for wrong in (
        "open.py:f",
        "..own:f",
        "json",
        "json:no",
        "no_such_module:f",
        "no.py:f",
        "json:__name__",
    ):
        with pytest.raises(ValueError, match="`properties`"):
            function_of(wrong)
