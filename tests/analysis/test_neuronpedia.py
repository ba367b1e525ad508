"""What is written for Neuronpedia, column by column against the schema of its database."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sae import FeatureStore
from lightning_sae.analysis.neuronpedia import write_neuronpedia
from lightning_sae.analysis.store import write_store

D_SAE, BINS = 130, 40
SCHEMA = json.loads((Path(__file__).parent / "neuronpedia_schema.json").read_text())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """An analysis written by hand: latent 0 fires on 8 of 100 tokens, no other one does."""
    table = {"frequency": torch.zeros(D_SAE), "maximum": torch.zeros(D_SAE)}
    table["frequency"][0], table["maximum"][0] = 0.08, 4.0
    histogram = torch.zeros(D_SAE, BINS)
    histogram[0, 5], histogram[0, 15], histogram[0, 39] = 4.0, 3.0, 1.0  # below 1/4, 1/2, top
    ids = torch.arange(3).repeat(D_SAE, 1)
    arrays = {
        "histogram": histogram,
        "neighbours": torch.arange(2).repeat(D_SAE, 1),
        "neighbour_cosine": torch.full((D_SAE, 2), 0.5),
        "raised": ids,
        "raised_by": torch.full((D_SAE, 3), 1.25),
        "lowered": ids.clone(),
        "lowered_by": torch.full((D_SAE, 3), -1.25),
    }
    contexts = {
        "tokens": torch.tensor([[-1, 1, 2, 0], [0, 1, 2, 1]]),
        "shares": torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.375, 0.0]]),
        "interval": torch.tensor([0, 2]),
        "starts": torch.cat([torch.zeros(1), torch.full((D_SAE,), 2)]).long(),
        "at": torch.tensor(2),
    }
    source = {"model": "Some/Model_1.5", "hook_name": "blocks.3.hook_resid_post"}
    results = {
        "source": {**source, "context_length": 4, "text": "some/text"},
        "sae": {"architecture": "ReLUSAE"},
        "tokens": 100,
    }
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, table, arrays, contexts, {0: "a", 1: "\u0000", 2: "é"}, results)
    return FeatureStore(folder)


@pytest.fixture(scope="module")
def rows(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """All rows that are written, by table."""
    root = write_neuronpedia(store, tmp_path_factory.mktemp("neuronpedia"))
    assert root.parts[-2:] == ("model_1-5", "3-res-130")
    single = ("release", "model", "sourceset", "source")
    found = {name: _lines((root / f"{name}.jsonl").read_bytes()) for name in single}
    for name in ("features", "activations"):
        files = sorted((root / name).iterdir())
        assert [path.name for path in files] == ["batch-0.jsonl.gz", "batch-1.jsonl.gz"]
        found[name] = [row for f in files for row in _lines(gzip.decompress(f.read_bytes()))]
    return found


def _lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.decode().splitlines()]


KINDS: dict[str, Any] = {
    "String": lambda value: isinstance(value, str),
    "Visibility": lambda value: value in ("PUBLIC", "UNLISTED", "PRIVATE"),
    "DateTime": lambda value: isinstance(value, str) and value[4] == "-" and value[10] == "T",
    "Boolean": lambda value: isinstance(value, bool),
    "Int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "Float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
TABLES = {
    "release": "SourceRelease",
    "model": "Model",
    "sourceset": "SourceSet",
    "source": "Source",
    "features": "Neuron",
    "activations": "Activation",
}


@pytest.mark.parametrize("name", list(TABLES))
def test_every_column_is_one_of_the_table_and_of_its_type(name: str, rows: dict) -> None:
    columns = SCHEMA[TABLES[name]]
    needed = {c for c, kind in columns.items() if not kind.endswith(("?", "*", "[]"))}
    assert rows[name]
    for row in rows[name]:
        assert row.keys() <= columns.keys()
        assert needed <= row.keys()
        assert row.keys() == rows[name][0].keys()  # the importer takes the first row's columns
        for column, value in row.items():
            kind = columns[column].rstrip("*")
            if value is None:
                assert kind.endswith("?"), column
            elif kind.endswith("[]"):
                assert all(map(KINDS[kind[:-2]], value)), column
            else:
                assert KINDS[kind.rstrip("?")](value), (column, value)


def test_rows_refer_to_each_other_as_the_database_wants_it(rows: dict) -> None:
    (release,), (model,), (own,), (source,) = (rows[n] for n in list(TABLES)[:4])
    assert (own["modelId"], own["releaseName"]) == (model["id"], release["name"])
    assert (source["modelId"], source["setName"]) == (model["id"], own["name"])
    features = {(row["modelId"], row["layer"], row["index"]) for row in rows["features"]}
    assert features == {(model["id"], source["id"], str(latent)) for latent in range(D_SAE)}
    assert {(r["modelId"], r["layer"], r["index"]) for r in rows["activations"]} <= features
    assert len({row["id"] for row in rows["activations"]}) == len(rows["activations"]) == 2
    assert {row["creatorId"] for each in rows.values() for row in each} == {source["creatorId"]}


def test_figures_are_those_of_the_analysis(rows: dict) -> None:
    feature = rows["features"][0]
    assert (feature["maxActApprox"], feature["frac_nonzero"]) == (4.0, pytest.approx(0.08))
    assert feature["freq_hist_data_bar_heights"][39] == 1.0
    assert feature["freq_hist_data_bar_values"][:2] == [0.05, 0.15]
    assert (feature["pos_str"], feature["neg_values"]) == (["a", "\u0000", "é"], [-1.25] * 3)
    assert (feature["topkCosSimIndices"], feature["topkCosSimValues"]) == ([0, 1], [0.5, 0.5])


def test_pieces_have_their_strongest_token_and_their_interval(rows: dict) -> None:
    strongest, drawn = rows["activations"]
    assert strongest["tokens"] == ["\u0000", "é", "a"]
    assert strongest["values"] == [0.0, 4.0, 2.0]
    assert (strongest["maxValue"], strongest["maxValueTokenIndex"]) == (4.0, 1)
    assert strongest["qualifyingTokenIndex"] == 1
    assert (strongest["binMin"], strongest["binMax"], strongest["binContains"]) == (-1, 4, -1)
    # Between a quarter and a half of the largest lie the 3 firings of bin 15, of 100 tokens.
    assert (drawn["binMin"], drawn["binMax"], drawn["binContains"]) == (1.0, 2.0, 0.03)


def test_names_that_neuronpedia_does_not_take_are_refused(
    store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="`set_name` to be of letters, digits, - and _ but got"):
        write_neuronpedia(store, tmp_path, set_name="a/b")
    write_neuronpedia(store, tmp_path)
    with pytest.raises(ValueError, match="`folder` to be new but got .* exists"):
        write_neuronpedia(store, tmp_path)
