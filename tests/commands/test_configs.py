"""Configurations that come with the package."""

from pathlib import Path

import pytest
import yaml

from lightning_sae.commands import configs


def test_every_configuration_has_a_name_and_a_summary(repository: Path) -> None:
    files = list((repository / "configs").rglob("*.yaml"))
    assert len(configs.names()) == len(files) > 10
    for name in configs.names():
        assert (repository / "configs" / f"{name}.yaml").is_file()
        assert configs.summary(name).count("\n") == 0
        assert 20 < len(configs.summary(name)) < 200


def test_a_name_means_the_packages_file_only_where_there_is_no_such_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(configs.FOLDER / "topk.yaml")
    args = ["fit", "--config", "topk", "--config=topk.yaml", "-c", "topk", "--model", "topk"]
    found = ["fit", "--config", packaged, f"--config={packaged}", "-c", packaged, "--model", "topk"]
    assert configs.with_files(args) == found
    Path("topk").write_text("own")
    assert configs.with_files(args)[2] == "topk"


def test_an_unknown_name_is_refused_with_all_known_ones() -> None:
    with pytest.raises(ValueError, match="one of batch_topk, ddp, .* but got nothing"):
        configs.with_files(["fit", "--config", "nothing"])


def test_one_is_written_for_editing_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs.main(["topk"])
    content = yaml.safe_load(Path("topk.yaml").read_text())
    assert content["model"]["class_path"] == "lightning_sae.TopKSAE"
    assert "lightning-sae fit --config topk.yaml" in capsys.readouterr().out
    with pytest.raises(ValueError, match="topk.yaml exists"):
        configs.main(["topk"])
    configs.main(["topk", "--output", "folder/mine.yaml"])
    assert Path("folder/mine.yaml").read_text() == Path("topk.yaml").read_text()


@pytest.mark.parametrize(
    "text",
    ["model: &a {b: *a}", "- &a [1, [*a]]", "trainer: &a {callbacks: [*a]}", "? &a [*a]\n: 1"],
)
def test_a_value_that_contains_itself_is_refused(text: str, tmp_path: Path) -> None:
    """The parser of the command line would not end."""
    path = tmp_path / "own.yaml"
    path.write_text(text)
    for given in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(ValueError, match=r"own\.yaml: a value contains itself"):
            configs.with_files(["fit", *given])


def test_a_value_may_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("a: &a [1, 2]\nb: &b [*a, *a]\nc: {d: *a, e: *b}")
    assert configs.with_files(["-c", str(path)]) == ["-c", str(path)]


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    configs.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.names()


DOCUMENTS = {"full/replication-gelu-1l", "full/suppression-pythia-70m"}
"""Settings of documents that give a coefficient."""


@pytest.mark.parametrize("name", sorted({*configs.names()} - DOCUMENTS))
def test_each_asks_for_an_l0_and_not_for_a_coefficient(name: str) -> None:
    model = yaml.safe_load(Path(configs.found(name)).read_text())["model"]
    saes = [model["init_args"]]
    if "members" in model["init_args"]:
        members = model["init_args"]["members"]
        saes = [member["sae"]["init_args"] | member.get("sweep", {}) for member in members]
    for arguments in saes:
        assert arguments.keys() & {"k", "target_l0"}
        assert "l1_coefficient" not in arguments
