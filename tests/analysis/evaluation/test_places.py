"""SAEs at several hooks, models and filters: which share a pass, and how the table names them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_sae import TopKSAE
from lightning_sae.analysis.evaluation.places import grouped
from lightning_sae.analysis.evaluation.table import markdown, over_seeds, picture, rows_of, write

SOURCE = {"model": "gpt", "hook_name": "blocks.0.hook_resid_post", "text": "embedded"}


def sae_of(**source: Any) -> TopKSAE:
    sae = TopKSAE(4, 8, k=2)
    sae.source = SOURCE | source
    return sae


def test_saes_share_a_pass_only_if_all_settings_of_their_activations_are_equal() -> None:
    saes = {
        "a": sae_of(),
        "default": sae_of(drop_special_tokens=True, document_start="auto (bos before texts)"),
        "kept": sae_of(drop_special_tokens=False),
        "old": sae_of(model_revision="v1"),
    }
    groups, places = grouped(saes, {})
    assert [[*group] for group in groups] == [["a", "default"], ["kept"], ["old"]]
    assert places == [[], ["drop_special_tokens=False"], ["model_revision=v1"]]
    groups, places = grouped({name: saes[name] for name in ("a", "old")}, {"model": "other"})
    assert ([[*group] for group in groups], places) == ([["a", "old"]], [[]])


def test_models_and_texts_are_named_by_their_last_parts_if_these_tell_them_apart() -> None:
    saes = {"a": sae_of(model="x/gpt", text=["y/a.txt"]), "b": sae_of(model="x/llama")}
    assert grouped(saes, {})[1] == [["gpt"], ["llama"]]
    saes["c"] = sae_of(model="x/gpt")
    assert grouped(saes, {})[1] == [["gpt", "a.txt"], ["llama", "embedded"], ["gpt", "embedded"]]
    saes = {"a": sae_of(model="x/gpt"), "b": sae_of(model="y/gpt")}
    assert grouped(saes, {})[1] == [["x/gpt"], ["y/gpt"]]


def figures(fvu: float, pairs: list[str]) -> dict[str, Any]:
    held_out = {"fvu": fvu, "l0": 1.0, "ce_spliced": 2.0, "ce_clean": 1.0}
    found = [{"with": n, **dict.fromkeys(STABILITY, 0.5)} for n in pairs]
    return {
        "held_out": held_out,
        "compute": None,
        "probing": {},
        "absorption": {},
        "duplicates": 0.0,
        "together": float("nan"),
        "stability": {"pairs": found},
    }


STABILITY = ("decoder_mean", "decoder_above_0.9", "random_mean")


def result(name: str, place: list[str], fvu: float = 0.1, pairs: Any = ()) -> dict[str, Any]:
    about = dict.fromkeys(("path", "architecture", "d_in", "d_sae", "model", "hook_name"), "x")
    return about | {"name": name, "place": place, "figures": figures(fvu, [*pairs])}


def reference(hook: str, place: list[str]) -> dict[str, Any]:
    probed = {
        "of": "token",
        "activation": 0.9,
        "neurons_1": 0.5,
        "neurons_2": 0.5,
        "neurons_5": 0.6,
    }
    about = {"hook_name": hook, "place": place, "neurons_at": "blocks.0.mlp.hook_post"}
    return about | {"probing": {"capital": probed}}


def first_cells(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_with_one_hook_rows_have_plain_names() -> None:
    table = markdown([result("a", [])], [reference("mlp", [])])
    neurons = "neurons, `blocks.0.mlp.hook_post`"
    assert first_cells(table) == ["a", neurons, "the whole activation"]


def test_with_several_hooks_every_row_names_its_own() -> None:
    results = [
        result("a-0", ["resid"], pairs=["a-1"]),
        result("a-1", ["resid"], pairs=["a-0"]),
        result("b-hook=mlp", ["mlp"]),
    ]
    references = [reference("resid", ["resid"]), reference("mlp", ["mlp"])]
    assert first_cells(markdown(results, references)) == [
        "a-0, `resid`",
        "a-1, `resid`",
        "b-hook=mlp",
        "neurons, `blocks.0.mlp.hook_post`",
        "the whole activation, `resid`",
        "the whole activation, `mlp`",
    ]
    assert first_cells(over_seeds(results)) == ["a, `resid`"]
    axis = picture(results).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "a-0, resid",
        "a-1, resid",
        "b-hook=mlp",
    ]
    assert rows_of(results)["place"].tolist() == ["resid", "resid", "mlp"]


def test_neurons_of_two_models_are_told_apart() -> None:
    references = [reference("resid", ["gpt"]), reference("resid", ["llama"])]
    assert first_cells(markdown([], references)) == [
        "neurons, `blocks.0.mlp.hook_post`, `gpt`",
        "the whole activation, `gpt`",
        "neurons, `blocks.0.mlp.hook_post`, `llama`",
        "the whole activation, `llama`",
    ]


@pytest.mark.parametrize("fvu", [float("inf"), float("nan"), 3.9e35])
def test_figures_that_cannot_be_drawn_do_not_cost_the_table(fvu: float, tmp_path: Path) -> None:
    results = [result("a", [], fvu), result("b | c", [])]
    evaluation = {"saes": results, "references": [reference("resid", [])]}
    write(tmp_path / "out", evaluation)
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert "3.90e+35" in table or fvu != 3.9e35
    assert "| b \\| c |" in table
    assert pd.read_csv(tmp_path / "out" / "evaluation.csv")["name"].tolist() == ["a", "b | c"]


def test_bars_below_the_usual_range_are_drawn() -> None:
    one, other = result("a", []), result("b", [])
    one["figures"]["held_out"]["loss_recovered_zero"] = -0.4
    other["figures"]["held_out"]["loss_recovered_zero"] = -0.2
    axis = next(a for a in picture([one, other]).axes if a.get_title() == "loss recovered")
    assert axis.get_xlim()[0] == -0.4
    assert axis.get_xlim()[1] >= 0


def test_a_missing_figure_does_not_look_like_zero() -> None:
    one, other = result("a", []), result("b", [])
    one["figures"]["together"] = 0.0
    axis = next(a for a in picture([one, other]).axes if a.get_title() == "always together")
    assert [(text.get_text(), text.get_position()[1]) for text in axis.texts] == [("no figure", 1)]
