"""Pages of an analysis: their data, what they load, and what a browser makes of them."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_sae import FeatureStore
from lightning_sae.analysis.site.writer import CHUNK, write_page, write_site
from lightning_sae.analysis.store import write_store

D_SAE = 20
EVIL = "</script><img src=x onerror=alert(1)>\u2028"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A made-up analysis; latent 19 is silent, and one token is hostile."""
    folder = tmp_path_factory.mktemp("site")
    maximum = torch.arange(D_SAE, 0, -1).float()
    maximum[-1] = 0
    table = {
        "frequency": maximum / 100,
        "firings": maximum.long() * 10,
        "maximum": maximum,
        "mean": torch.where(maximum > 0, maximum / 2, torch.nan),
        "projection": torch.linspace(0, 1, D_SAE),
        "encoder_decoder_cosine": torch.ones(D_SAE),
        "kurtosis": torch.zeros(D_SAE),
    }
    number = torch.arange(D_SAE).unsqueeze(1)
    arrays = {
        "histogram": torch.ones(D_SAE, 4),
        "fires_on": torch.cat([number % 3, -torch.ones_like(number)], 1),
        "fires_on_count": torch.cat([number, 0 * number], 1),
        "fires_on_mean": torch.ones(D_SAE, 2),
        "partners": (number + 1) % D_SAE,
        "partner_count": number,
        "neighbours": (number + 2) % D_SAE,
        "neighbour_cosine": number / D_SAE,
    }
    contexts = {
        "tokens": torch.tensor([[-1, 0, 1, 2]]).expand(D_SAE - 1, 4),
        "shares": torch.tensor([[0.0, 0.5, 1.0, 0.0]]).half().expand(D_SAE - 1, 4),
        "interval": torch.zeros(D_SAE - 1, dtype=torch.int32),
        "starts": torch.tensor([*range(D_SAE), D_SAE - 1]),
        "at": torch.tensor(2),
    }
    results = {
        "source": {"model": EVIL, "hook_name": "hook", "text": "text"},
        "sae": {"architecture": "ReLUSAE", "d_in": 4, "d_sae": D_SAE},
        "tokens": 100,
        "left_out": 7,
        "l0": 2.5,
        "dead": 0.05,
        "logits": None,
        "rare_latents": {
            "n_rare": 2.0,
            "cosine_with_mean": 0.98,
            "others_with_mean": None,
            "encoder_on_one_direction": 0.9,
            "decoder_on_one_direction": 0.125,
            "inputs": [{"along": 7.5, "firing": 0.5, "before": "b ", "token": EVIL, "after": " a"}],
        },
    }
    write_store(folder, table, arrays, contexts, {0: "import", 1: EVIL, 2: "b\n"}, results)
    store = FeatureStore(folder)
    write_site(store)
    return store


def content(path: Path) -> dict:
    """The latents of a script, which must be JSON but for what stands round it."""
    match = re.fullmatch(r"Object\.assign\(window\.SAE\.latents, (.*)\);", path.read_text("utf-8"))
    assert match is not None
    return json.loads(match[1])


def test_each_latents_data_lie_in_a_small_file_with_its_own_figures(store: FeatureStore) -> None:
    files = sorted((store.folder / "latents").iterdir())
    assert [file.name for file in files] == ["0.js", "1.js"]
    latents = content(files[0]) | content(files[1])
    assert sorted(map(int, latents)) == list(range(D_SAE))
    assert len(content(files[0])) == CHUNK
    one = latents["5"]
    assert one["contexts"] == [
        {"tokens": ["import", EVIL, "b\n"], "shares": [128, 255, 0], "at": 1, "interval": 0}
    ]
    assert one["fires_on"] == [["b\n", 5]]
    assert (one["neighbours"], one["partners"]) == ([[7, 0.25]], [[6, 5]])
    assert latents["19"]["contexts"] == []


def test_nothing_comes_from_a_network_and_text_cannot_end_a_script(store: FeatureStore) -> None:
    for file in [*store.folder.rglob("*.js"), store.folder / "index.html"]:
        text = file.read_text("utf-8")
        assert "<img" not in text, file
        assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text)
    sources = re.findall(r'<script src="([^"]+)"', (store.folder / "index.html").read_text())
    assert sources == ["table.js"]


def test_a_page_of_some_latents_needs_no_other_file(store: FeatureStore, tmp_path: Path) -> None:
    page = write_page(store, [3, 17], tmp_path / "some.html").read_text("utf-8")
    assert "<script src" not in page
    assert "<img" not in page
    assert '"3":' in page
    assert '"4":' not in page
    with pytest.raises(ValueError, match="from 0 to 19 but got 20"):
        write_page(store, [20], tmp_path / "none.html")


def test_the_page_has_the_rare_latents_and_their_inputs(store: FeatureStore) -> None:
    page = (store.folder / "index.html").read_text()
    assert "Rare latents: 2 below a gap" in page
    assert (
        "with the mean of these\n        0.98, of all other latents' with it\n        unknown"
        in page
    )
    assert "<td>7.50</td><td>50 %</td>" in page
    assert f"b <mark>{html.escape(EVIL, quote=False)[:4]}" in page
    assert EVIL not in page


chromium = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(chromium is None, reason="Chromium is not installed")


def opened(path: str, *more: str) -> str:
    """What a browser shows of a page that is opened from the disk."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", *more]
    command = [chromium or "", *options, "--dump-dom", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
def test_a_browser_shows_the_latent_of_a_link_from_the_disk(store: FeatureStore) -> None:
    shown = opened(f"file://{store.folder}/index.html#17")
    assert "<h2>Latent 17</h2>" in shown
    assert "20 of 20 latents" in shown
    assert f"<b>{store.table['projection'][17]:.3f}</b>" in shown
    assert 'title="3.00"' in shown or 'title="3"' in shown  # its largest activation
    assert "onerror" in shown
    assert "<img" not in shown


@needs_browser
def test_a_browser_shows_a_self_contained_page(store: FeatureStore, tmp_path: Path) -> None:
    write_page(store, [3, 17], tmp_path / "some.html")
    shown = opened(f"file://{tmp_path}/some.html#3")
    assert "<h2>Latent 3</h2>" in shown
    assert "2 of 2 latents" in shown


def used(store: FeatureStore, tmp_path: Path, script: str, width: int = 1200) -> str:
    """What a script returns that uses the page as a reader does, in a browser of this width."""
    folder = Path(shutil.copytree(store.folder, tmp_path / "used"))
    page = (folder / "index.html").read_text("utf-8")
    called = f"<script>setTimeout(() => {{ document.title = (() => {{{script}}})(); }});</script>"
    (folder / "index.html").write_text(page + called, "utf-8")
    shown = opened(f"file://{folder}/index.html#3", f"--window-size={width},800")
    match = re.search(r"<title>([^<]*)</title>", shown)
    assert match is not None
    return match[1]


NUMBERS = """
const numbers = () =>
  [...document.querySelectorAll("#table tbody td:first-child")]
    .map(cell => cell.textContent).join(" ");
"""


@needs_browser
def test_a_search_finds_latents_by_token_number_and_figure(
    store: FeatureStore, tmp_path: Path
) -> None:
    found = {
        "import": "0 3 6 9 12 15 18",  # the token with which each third latent fires
        "17": "17",
        "maximum > 15 import": "0 3",
        "projection < 0.1": "0 1",
        "nothing": "",
    }
    search = f"""
    {NUMBERS}
    const query = document.getElementById("query");
    return {json.dumps(list(found))}.map(wanted => {{
      query.value = wanted;
      query.dispatchEvent(new Event("input"));
      return numbers();
    }}).join("|");
    """
    assert used(store, tmp_path, search).split("|") == list(found.values())


@needs_browser
def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(
    store: FeatureStore, tmp_path: Path
) -> None:
    clicks = f"""
    {NUMBERS}
    const click = () => [...document.querySelectorAll("#table thead button")]
      .find(button => button.textContent.startsWith("projection")).click();
    return [1, 2].map(_ => {{ click(); return numbers(); }}).join("|");
    """
    down, up = used(store, tmp_path, clicks).split("|")
    assert down.split() == [str(latent) for latent in reversed(range(D_SAE))]
    assert up.split() == [str(latent) for latent in range(D_SAE)]


@needs_browser
def test_the_right_arrow_opens_the_next_latent_of_the_table(
    store: FeatureStore, tmp_path: Path
) -> None:
    press = 'document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));'
    assert used(store, tmp_path, press + "return location.hash;") == "#4"


@needs_browser
def test_a_phone_scrolls_the_page_only_downwards(store: FeatureStore, tmp_path: Path) -> None:
    excess = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"
    assert used(store, tmp_path, excess, width=500) == "0"
