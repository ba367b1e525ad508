"""A dictionary in several parts is the whole on one rank, to rounding."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_sae
from benchmarks.scaling import sent_a_step
from lightning_sae.cli import main
from tests.ranks.cases import CASES, D_SAE, activations, train
from tests.ranks.command import write_config
from tests.ranks.conftest import OfParts
from tests.ranks.split_cases import (
    IN_FOUR,
    IN_GRID,
    SENT,
    SENT_ROWS,
    SENT_WIDTH,
    SPLIT,
    STREAMED,
    toy_run,
    watched,
)
from tests.ranks.split_memory import LATER, MATRIX

# Runs of a few steps.
pytestmark = pytest.mark.filterwarnings("ignore:.TargetL0. did not reach its target:UserWarning")

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("state", "moments", "logged", "penalty_factor"):
        torch.testing.assert_close(found[part], expected[part], **close)


@pytest.mark.parametrize("name", SPLIT)
def test_two_parts_are_the_whole(name: str, of_parts: OfParts) -> None:
    """Weights, counts, moments and what is logged, as a checkpoint has them."""
    first, second = (found["cases"][name] for found in of_parts.two)
    assert_same(first, train(SPLIT[name], activations()))
    torch.testing.assert_close(second["logged"], first["logged"], rtol=0, atol=0)
    assert torch.equal(second["state"]["b_dec"], first["state"]["b_dec"])


@pytest.mark.parametrize("name", [*IN_GRID, *IN_FOUR])
def test_four_ranks_are_one(name: str, of_parts: OfParts) -> None:
    """Two copies in two parts each, with half the batch each; and four parts."""
    assert_same(of_parts.four[0][name], train(CASES[name], activations()))


@pytest.mark.parametrize("name", STREAMED)
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(name: str, of_parts: OfParts) -> None:
    found = of_parts.two[0]["streamed"][name]
    whole = found["whole"]["state"]
    assert all(torch.equal(found["resumed"][name], weight) for name, weight in whole.items())


def test_each_part_goes_on_in_its_layout(of_parts: OfParts) -> None:
    """Layouts differ by rounding, and parts may have different ones."""
    for name in STREAMED:
        assert [found["streamed"][name]["dense"] for found in of_parts.two] == [False, True]


@pytest.mark.parametrize("name", STREAMED)
def test_one_rank_goes_on_from_two_and_two_from_one(name: str, of_parts: OfParts) -> None:
    found = of_parts.two[0]["streamed"][name]
    one = toy_run(of_parts.folder / name / "for-one", 8)
    for state in (one["state"], found["of_one"]):
        torch.testing.assert_close(state, found["whole"]["state"], **close)
    assert one["metrics"] == pytest.approx(found["whole"]["metrics"], rel=1e-5)


@pytest.mark.parametrize("name", STREAMED)
def test_ranks_of_a_grid_go_on_with_their_own_streams(name: str, of_parts: OfParts) -> None:
    found = of_parts.four[0][f"streamed-{name}"]
    assert all(torch.equal(found["resumed"][name], v) for name, v in found["whole"].items())


def test_only_copies_have_files_beside_a_checkpoint(of_parts: OfParts) -> None:
    of_two = of_parts.folder / "toy" / "stopped" / "checkpoints"
    assert [path.name for path in of_two.iterdir() if path.name[0] != "."] == ["last.ckpt"]
    names = {path.name for path in (of_parts.folder / "grid/toy/stopped/checkpoints").iterdir()}
    assert {name for name in names if name[0] != "."} == {"last.ckpt", "last.ckpt.step-8.rank-1"}


@pytest.mark.parametrize("name", STREAMED)
def test_what_is_exported_is_whole(name: str, of_parts: OfParts) -> None:
    folder = of_parts.folder / name
    saved = lightning_sae.load(folder / "exported")
    resumable = lightning_sae.load(folder / "stopped" / "checkpoints" / "last.ckpt")
    for found in of_parts.two:
        used = found["streamed"][name]["used"]
        for sae in (saved, resumable):
            assert sae.W_dec.shape == (24, 12)
            torch.testing.assert_close(sae.encode(used["x"]), used["f"], **close)
            for part in ("x_hat", "decoded"):
                torch.testing.assert_close(sae(used["x"]), used[part], **close)


def test_a_run_of_the_command_line_is_that_of_one_rank(of_parts: OfParts) -> None:
    """On a language model's activations, with held-out figures and loss recovered."""
    config = write_config(of_parts.folder / "single", devices=1, strategy="auto")
    main(["fit", "--config", str(config)])
    last = of_parts.folder / "single" / "checkpoints" / "last.ckpt"
    main(["test", "--config", str(config), "--ckpt_path", str(last)])
    one, two = (
        load_file(of_parts.folder / name / "sae" / "sae.safetensors") for name in ("single", "two")
    )
    torch.testing.assert_close(two, one, **close)
    one, two = (
        json.loads((of_parts.folder / name / "results.json").read_text())
        for name in ("single", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_what_one_sees_is_of_all_latents(of_parts: OfParts) -> None:
    """Contexts, labelled decoder rows and pictures are those of one rank."""
    watched(of_parts.folder / "watched-alone")
    one, two = (of_parts.folder / name / "tb" for name in ("watched-alone", "watched"))
    seen = [EventAccumulator(str(at), {"images": 0, "tensors": 0}).Reload() for at in (one, two)]
    texts = [each.Tensors("latents/top_contexts/text_summary") for each in seen]
    tables = [text.tensor_proto.string_val[0].decode() for (text,) in texts]
    assert len(tables[0].splitlines()) > 12
    assert tables[1] == tables[0]
    for name in ("frequency_over_training", "frequency_against_projection"):
        pictures = [each.Images(f"latents/{name}") for each in seen]
        assert [len(each) for each in pictures] == [2, 2]
        assert pictures[1][-1].encoded_image_string == pictures[0][-1].encoded_image_string
    labels = [next(at.rglob("metadata.tsv")).read_text() for at in (one, two)]
    assert labels[1] == labels[0]
    rows = [
        [[float(value) for value in line.split()] for line in table.read_text().splitlines()]
        for table in (next(at.rglob("tensors.tsv")) for at in (one, two))
    ]
    torch.testing.assert_close(torch.tensor(rows[1]), torch.tensor(rows[0]), **close)


def test_each_rank_holds_its_own_latents_alone(of_parts: OfParts) -> None:
    """A half, or every second one, so that each has the same share of each Matryoshka prefix."""
    latents = {"toy": (range(12), range(12, 24)), "dealt": (range(0, 24, 2), range(1, 24, 2))}
    for name in STREAMED:
        whole = of_parts.two[0]["streamed"][name]["whole"]["state"]
        for own, found in zip(latents[name], of_parts.two, strict=True):
            held, index = found["streamed"][name]["own"], torch.tensor(own)
            assert held.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
            assert torch.equal(held["W_enc"], whole["W_enc"][:, index])
            assert torch.equal(held["W_dec"], whole["W_dec"][index])
            assert torch.equal(held["b_enc"], whole["b_enc"][index])
            assert held["W_enc"].mT.is_contiguous()


def test_each_rank_draws_its_own_latents_alone(of_parts: OfParts) -> None:
    """With the same results bit for bit, and so does the command line with its callbacks."""
    for found in of_parts.two:
        later = found["later"]
        assert later["drawn"] == [D_SAE // 2] * len(LATER)
        for name, run in later["runs"].items():
            expected = found["cases"][name]
            assert run.keys() == expected.keys()
            for part in ("state", "moments"):
                torch.testing.assert_close(run[part], expected[part], rtol=0, atol=0)
        assert found["drawn"] == [128]


def test_a_rank_needs_memory_for_its_part_alone(of_parts: OfParts) -> None:
    """A new run allocates half of both matrices; a resumed one half of their moments as well.

    Vectors of all latents and pieces take less than .4 of a matrix here, where the whole would take
    2 matrices more to start with.
    """
    for found in of_parts.two:
        assert 1 <= found["peaks"]["started"] / MATRIX < 1.5
        assert 3 <= found["peaks"]["resumed"] / MATRIX < 3.5


def test_devices_that_cannot_be_divided_are_refused(of_parts: OfParts) -> None:
    for found in of_parts.two:
        three, unlike = found["refused"]
        assert "`parts` to divide the 2 devices of the run but got 3" in three
        assert "`parts` to be the same on all ranks but, from rank 0 on, got 1, 2" in unlike


def test_weights_that_are_not_finite_end_the_run_on_all_ranks(of_parts: OfParts) -> None:
    first, second = (found["not_finite"] for found in of_parts.two)
    assert "not finite after optimizer step 2 (on another device)" in first
    assert "not finite after optimizer step 2 (W_enc)" in second


@pytest.mark.parametrize("name", SENT)
def test_a_step_sends_what_the_plan_says(name: str, of_parts: OfParts) -> None:
    """And little more: counts, norms and the like, less than 500 bytes."""
    terms: dict[str, dict[str, Any]] = {
        "relu": {},
        "topk": {"k": 5},
        "topk-dead": {"k": 5, "k_aux": 4},
        "gated": {"n_reconstructions": 2},
        "matryoshka": {"n_reconstructions": 3, "k": 5, "over_batch": True},
    }
    plan = sent_a_step(SENT_WIDTH, SENT_ROWS, **terms[name])
    for found in of_parts.two:
        for sent in found["sent"][name][1:]:
            reduced = plan["reconstruction"] + plan["b_dec"]
            assert 0 <= sent["all_reduce"] - reduced < 500
            assert sent["all_gather"] == plan["candidates"]
