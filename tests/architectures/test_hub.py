"""SAEs on the hub, against a server of this process that answers as the hub's endpoint does."""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_hub_download

import lightning_sae
from lightning_sae import ReLUSAE, TopKSAE
from lightning_sae.architectures.hub import is_hub_name
from lightning_sae.commands.push import push
from lightning_sae.interop import export


class StandIn(ThreadingHTTPServer):
    """Repositories in memory: commits are maps from path to content; branches name commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.served: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        branches = self.branches.setdefault(repo, {})
        whole = {**self.commits.get(branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(repr((repo, sorted(whole.items()))).encode()).hexdigest()
        self.commits[name], branches[branch] = whole, name
        return name


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args):
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def found(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; refuses what there is not."""
        if repo not in self.server.branches:
            self.refuse("RepoNotFound", 401)
            return None
        name = self.server.branches[repo].get(revision, revision)
        if name not in self.server.commits:
            self.refuse("RevisionNotFound")
            return None
        return name

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, kind, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            name = self.found(repo, revision)
            if name is None:
                return
            files = self.server.commits[name]
            if kind == "tree":
                rows = [
                    {"type": "file", "path": path, "size": len(own), "oid": _hash(own)}
                    for path, own in files.items()
                ]
                self.answer(rows, X_Repo_Commit=name)
            else:
                siblings = [{"rfilename": path} for path in files]
                self.answer({"id": repo, "sha": name, "siblings": siblings})
            return
        repo, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        name = self.found(repo, revision)
        if name is not None and path in self.server.commits[name]:
            own = self.server.commits[name][path]
            if self.command == "GET":
                self.server.served.append(path)
            self.answer(own, X_Repo_Commit=name, ETag=f'"{_hash(own)}"')
        elif name is not None:
            self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization')}/{asked['name']}"
            self.server.branches.setdefault(repo, {})
            self.server.branches[repo].setdefault("main", self.server.commit(repo, {}))
            self.answer({"url": f"{constants.ENDPOINT}/{repo}", "name": repo, "id": repo})
        elif parts == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        else:
            repo = "/".join(parts[2:4])
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            name = self.server.commit(repo, files, parts[5])
            url = f"{constants.ENDPOINT}/{repo}/commit/{name}"
            self.answer({"commitUrl": url, "commitOid": name, "success": True})


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, as if `HF_ENDPOINT` had named it, with an empty cache on disk."""
    server = StandIn()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.utils.disable_progress_bars()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def sae() -> TopKSAE:
    """An SAE with random weights, scaled inputs and an origin."""
    sae = TopKSAE(4, 6, k=2)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    sae.input_scale.fill_(3.0)
    sae.source = {"model": "some/model", "hook_name": "blocks.0.hook_resid_post"}
    sae.n_trained = 4096
    return sae


def test_what_is_pushed_is_loaded_by_its_name(hub: StandIn, sae: TopKSAE) -> None:
    x = torch.randn(5, 4)
    sae.push_to_hub("me/mine", figures={"fvu": 0.125})
    loaded = lightning_sae.load("me/mine")
    assert isinstance(loaded, TopKSAE)
    assert (loaded.source, loaded.n_trained) == (sae.source, 4096)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))
    assert type(TopKSAE.from_pretrained("me/mine")) is TopKSAE


def test_the_card_says_what_the_sae_is_and_how_it_is_loaded(hub: StandIn, sae: TopKSAE) -> None:
    sae.push_to_hub("me/mine", figures={"fvu": 0.125, "note": "a|b"})
    card = ModelCard.load(hf_hub_download("me/mine", "README.md"))
    assert (card.data.library_name, card.data.base_model) == ("lightning-sae", ["some/model"])
    assert "TopKSAE" in card.data.tags
    assert 'lightning_sae.load("me/mine")' in card.text
    for row in ("`fvu` | 0.125", "`k` | 2", "`d_sae` | 6", "`activations` | 4096", "a\\|b"):
        assert row in card.text
    assert f"`lightning_sae` | {lightning_sae.__version__}" in card.text


def test_a_revision_is_that_of_its_name(hub: StandIn, sae: TopKSAE) -> None:
    first = sae.push_to_hub("me/mine").split("/")[-1]
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    sae.push_to_hub("me/mine", branch="main")
    assert not torch.equal(
        lightning_sae.load("me/mine", revision=first).b_dec, lightning_sae.load("me/mine").b_dec
    )
    with pytest.raises(ValueError, match=r"me/mine from the hub: me/mine has no revision v9: give"):
        lightning_sae.load("me/mine", revision="v9")
    with pytest.raises(
        ValueError, match="`revision` to be None, because .* is not a name on the hub"
    ):
        lightning_sae.load("/no/such/folder", revision="main")


@pytest.fixture
def sweep(sae: TopKSAE, tmp_path: Path) -> Path:
    """What a run of two SAEs side by side leaves, the first of them tested."""
    run = tmp_path / "run"
    sae.save_pretrained(run / "members" / "k=2" / "sae")
    (run / "members" / "k=2" / "results.json").write_text('{"l0": 2.0, "fvu": 0.25}')
    ReLUSAE(4, 8).save_pretrained(run / "members" / "relu" / "sae")
    return run


def test_a_sweep_is_one_repository_with_a_folder_for_each(
    hub: StandIn, sweep: Path, sae: TopKSAE
) -> None:
    push(str(sweep), "me/sweep")
    x = torch.randn(5, 4)
    torch.testing.assert_close(lightning_sae.load("me/sweep/k=2")(x), sae(x))
    assert not any("relu" in path for path in hub.served)  # the other was not downloaded
    assert lightning_sae.load("me/sweep/relu").d_sae == 8
    (files,) = (hub.commits[name] for name in hub.branches["me/sweep"].values())
    assert json.loads(files["k=2/results.json"])["fvu"] == 0.25
    card = files["README.md"].decode()
    assert "| `k=2` | TopKSAE | blocks.0.hook_resid_post | 6 | 2 | 0.25 |" in card
    assert 'lightning_sae.load("me/sweep/k=2")' in card
    several = r"me/sweep from the hub: it holds several SAEs: .* me/sweep/k=2, me/sweep/relu"
    with pytest.raises(ValueError, match=several):
        lightning_sae.load("me/sweep")


def test_the_run_of_one_sae_lies_at_the_root(hub: StandIn, sweep: Path, sae: TopKSAE) -> None:
    push(str(sweep / "members" / "k=2"), "me/one")
    (files,) = (hub.commits[name] for name in hub.branches["me/one"].values())
    assert sorted(files) == ["README.md", "config.json", "results.json", "sae.safetensors"]
    assert "`fvu` | 0.25" in files["README.md"].decode()


def test_a_damaged_sae_is_not_published(hub: StandIn, sweep: Path) -> None:
    weights = sweep / "members" / "relu" / "sae" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="Could not read .*relu"):
        push(str(sweep), "me/sweep")
    assert not hub.branches
    with pytest.raises(ValueError, match="`run` to be the folder of an SAE or of a run"):
        push(str(sweep.parent / "nothing"), "me/sweep")


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_other_libraries_saes_are_loaded_by_name_too(
    hub: StandIn, sae: TopKSAE, format: str, tmp_path: Path
) -> None:
    folder = export(sae, tmp_path / "out", format)
    hub.commit("them/saes", {f"layer_3/{p.name}": p.read_bytes() for p in folder.iterdir()})
    x = torch.randn(5, 4)
    torch.testing.assert_close(lightning_sae.load("them/saes/layer_3").encode(x), sae.encode(x))


def test_only_what_the_sae_needs_is_downloaded(hub: StandIn, sae: TopKSAE, tmp_path: Path) -> None:
    folder = sae.save_pretrained(tmp_path / "sae")
    own = {f"a/{path.name}": path.read_bytes() for path in folder.iterdir()}
    others = ["a/optimizer_0.pt", "a/deep/x.safetensors", "b/ae.pt", "x.bin", "README.md"]
    hub.commit("me/many", {**own, **dict.fromkeys(others, b"1"), "config.json": b"{}"})
    lightning_sae.load("me/many/a")
    assert sorted(set(hub.served)) == ["a/config.json", "a/sae.safetensors", "config.json"]


def test_names_that_there_are_not_get_one_clear_line(hub: StandIn) -> None:
    hub.commit("me/empty", {"README.md": b"# nothing"})
    for name, why in (
        ("nobody/nothing", "no such repository, or it is not open to you, and there is no such"),
        ("me/empty", "it holds no weights"),
        ("me/empty/deeper", "it holds no weights"),
    ):
        with pytest.raises(ValueError, match=f"Could not read {name} from the hub: .*{why}") as e:
            lightning_sae.load(name)
        assert "\n" not in str(e.value)


def test_offline_what_was_downloaded_is_used_and_the_rest_refused(
    hub: StandIn, sae: TopKSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae.push_to_hub("me/mine")
    lightning_sae.load("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(lightning_sae.load("me/mine").W_dec, sae.W_dec)
    with pytest.raises(ValueError, match="the hub cannot be reached .*nothing of it was down") as e:
        lightning_sae.load("me/other")
    assert "\n" not in str(e.value)
    with pytest.raises(OSError, match="Could not push to me/other: .* Nothing here was changed"):
        push(str(sae.save_pretrained("saved")), "me/other")


def test_a_path_is_no_name_on_the_hub_where_its_first_folder_exists() -> None:
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name/some folder/k=2")
    Path("runs").mkdir()
    for path in ("runs/sae", "sae", "/owner/name", "../owner/name", "owner/../name", "a/b.ckpt"):
        assert not is_hub_name(path)
