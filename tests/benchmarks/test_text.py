from pathlib import Path

import datasets
import pytest

from benchmarks.text import EXACT, IDS, REFUSED, verdict


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_of_text_gives_the_tokenizers_tokens(kind: str) -> None:
    assert verdict(EXACT[kind]) == "exact"


@pytest.mark.parametrize("kind", REFUSED)
def test_damaged_and_foreign_text_is_refused(kind: str) -> None:
    assert verdict(REFUSED[kind]).startswith("refused: ")


def test_other_tokens_are_not_called_exact() -> None:
    assert verdict(lambda _: [ids[:-1] for ids in IDS]) == "WRONG"
