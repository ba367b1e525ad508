"""SAEs on the Hugging Face hub: the files of an SAE, and its model card."""

import glob
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from lightning_sae.checks import expect
from lightning_sae.files import first_line

OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = (".safetensors", ".npz", ".pt")
READ = (*WEIGHTS, ".json")
LEFT_ALONE = ("optimizer", "lr_scheduler", "trainer_state", "state.pt", "activations_store")
"""Prefixes of file names that are not SAEs, in folders of other libraries."""


def is_hub_name(path: str | Path) -> bool:
    """Whether a path that does not exist may be `owner/name` or `owner/name/folder` on the hub.

    If its first folder exists, it is a misspelt local path.
    """
    text = str(path)
    owner, *rest = text.split("/")
    plain = all(part not in ("", ".", "..") for part in rest)
    named = OWNER_AND_NAME.fullmatch("/".join((owner, *rest[:1]))) is not None
    return named and plain and not text.endswith(".ckpt") and not Path(owner).exists()


def on_disk(path: str | Path, revision: str | None = None) -> Path:
    """The local path of an SAE; files on the hub are downloaded once.

    Args:
        path: A folder or file, or the name `owner/name[/folder]` of one on the hub.
        revision: Branch, tag or commit of a repository on the hub.

    Raises:
        ValueError: If the hub has no such SAE, or cannot be reached and nothing was downloaded
            before, or `path` is no path.
    """
    named = isinstance(path, str | Path)
    expect(named, "path", "a path, or the name of an SAE on the hub", repr(path))
    if not Path(path).exists() and is_hub_name(path):
        return _downloaded(str(path), revision)
    expect(revision is None, "revision", f"None, because {path} is not a name on the hub", revision)
    return Path(path)


def _downloaded(name: str, revision: str | None) -> Path:
    owner, repository, *folders = name.split("/")
    repo_id, folder = f"{owner}/{repository}", "/".join(folders)
    try:
        files = HfApi().list_repo_files(repo_id, revision=revision)
        wanted = [glob.escape(file) for file in _files_of(name, folder, files)]
        root = snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
    except RevisionNotFoundError as error:
        reason = f"{repo_id} has no revision {revision}: give one of its branches, tags or commits"
        raise _refusal(name, reason) from error
    except RepositoryNotFoundError as error:
        reason = (
            "the hub has no such repository, or it is not open to you, and there is no such folder "
            "here: look at the name, or log in with `hf auth login`"
        )
        raise _refusal(name, reason) from error
    except ValueError:
        raise
    except Exception as error:  # network errors of many types
        root = _cached(name, repo_id, revision, error)
        _files_of(name, folder, _files_in(Path(root)))
    return Path(root, folder)


def _cached(name: str, repo_id: str, revision: str | None, error: Exception) -> str:
    """The earlier download, used if the hub cannot be reached."""
    try:
        return snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:
        reason = (
            f"there is no such folder here, the hub cannot be reached ({first_line(error)}), and "
            "nothing of it was downloaded before: give a local folder, or look at the network"
        )
        raise _refusal(name, reason) from error


def _files_in(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _files_of(name: str, folder: str, files: Iterable[str]) -> list[str]:
    """Files of the SAE in a folder of a repository: its weights and their descriptions.

    Raises:
        ValueError: If it holds no SAE; the message names folders that do.
    """
    files = [file for file in files if file.endswith(READ)]
    if folder in files:  # one file
        beside = PurePosixPath(folder).parent
        return [folder, *(f for f in files if f.endswith(".json") and _in(f, beside))]
    own = PurePosixPath(folder)
    found = [f for f in files if _in(f, own) or _in(f, own / "checkpoints")]
    found = [f for f in found if not PurePosixPath(f).name.startswith(LEFT_ALONE)]
    if not any(f.endswith(WEIGHTS) for f in found):
        inside = [f for f in files if own in PurePosixPath(f).parents and f.endswith(WEIGHTS)]
        repository = "/".join(name.split("/")[:2])
        others = sorted({f"{repository}/{PurePosixPath(f).parent}" for f in inside})
        if not others:
            raise _refusal(name, "it holds no weights (.safetensors, .npz or .pt)")
        shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if others[8:] else "")
        raise _refusal(name, f"it holds several SAEs: give the name of one, {shown}")
    above = [f for f in files if f.endswith(".json") and PurePosixPath(f).parent in own.parents]
    return found + above


def _in(file: str, folder: PurePosixPath) -> bool:
    return PurePosixPath(file).parent == folder


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"Could not read {name} from the hub: {reason}.")


# Cards.


def card_of(
    description: Mapping[str, Any], name: str, figures: Mapping[str, Any] | None = None
) -> ModelCard:
    """The model card of one SAE, from its settings.

    Args:
        description: Content of the `config.json` that `save_pretrained` wrote.
        name: Name of the repository, for the line that loads the SAE.
        figures: Its metrics on held-out text.
    """
    kind, where = description["architecture"], _origin(description["source"])
    sections = [
        f"# {name}",
        f"A sparse autoencoder (`{kind}`){where}, trained with lightning-sae.",
        _how_to_load([name]),
        _section("Figures on held-out text", figures or {}),
        _section("Settings", description["arguments"]),
        _section("Activations", description["source"]),
        _section("Training", description.get("training", {})),
        _section("Versions", description["versions"]),
    ]
    return _card(sections, [description])


def card_of_several(
    descriptions: Mapping[str, Mapping[str, Any]],
    name: str,
    figures: Mapping[str, Mapping[str, Any]],
) -> ModelCard:
    """The model card of a repository of several SAEs, one per folder.

    Args:
        descriptions: Descriptions by folder.
        name: Name of the repository.
        figures: Metrics by folder, where known.
    """
    rows = []
    for folder, description in descriptions.items():
        own = figures.get(folder, {})
        cells = [_shown(own[column]) if column in own else "" for column in SHOWN]
        sizes = [str(description["arguments"].get("d_sae", ""))]
        hook = str(description["source"].get("hook_name", ""))
        rows.append([f"`{folder}`", description["architecture"], hook, *sizes, *cells])
    table = _table(["folder", "architecture", "hook", "d_sae", *SHOWN], rows)
    models = {str(each["source"].get("model", "")) for each in descriptions.values()} - {""}
    of = f" of {', '.join(f'`{model}`' for model in sorted(models))}" if models else ""
    sections = [
        f"# {name}",
        f"{len(descriptions)} sparse autoencoders{of}, trained with lightning-sae.",
        _how_to_load([f"{name}/{next(iter(descriptions))}"]),
        f"## The SAEs\n\n{table}\n\nEach folder's `config.json` has all settings, its "
        "`results.json`, where there is one, all figures on held-out text.",
    ]
    return _card(sections, list(descriptions.values()))


SHOWN = ("l0", "fvu", "dead_fraction", "ce_spliced", "loss_recovered_zero")
"""Metrics in the table of several SAEs."""


def _origin(source: Mapping[str, Any]) -> str:
    named = [f"`{source[key]}`" for key in ("hook_name", "model") if source.get(key)]
    return f" of {' of '.join(named)}" if named else ""


def _how_to_load(names: list[str]) -> str:
    lines = [f'sae = lightning_sae.load("{name}")' for name in names]
    return (
        "## Load it\n\n```python\n# pip install lightning-sae\nimport lightning_sae\n\n"
        + "\n".join(lines)
        + "\nf = sae.encode(x)    # x: raw activations, (..., d_in) -> (..., d_sae)\n"
        "x_hat = sae.decode(f)\n```\n\nWeights act on raw activations: centring and scaling, if "
        "there were any, are folded in."
    )


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = [[f"`{key}`", _shown(value)] for key, value in values.items()]
    return f"## {title}\n\n{_table(['', ''], rows)}"


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _card(sections: list[str], descriptions: list[Mapping[str, Any]]) -> ModelCard:
    kinds = sorted({each["architecture"] for each in descriptions})
    models = {str(each["source"].get("model", "")) for each in descriptions}
    data = ModelCardData(
        library_name="lightning-sae",
        tags=["sparse-autoencoder", "interpretability", *kinds],
        base_model=sorted(model for model in models if is_hub_name(model)) or None,
    )
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
