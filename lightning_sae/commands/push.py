"""`lightning-sae push`: upload the SAE of a run, or all SAEs of a sweep, to the hub."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard
from jsonargparse import auto_cli

from lightning_sae.architectures.hub import card_of, card_of_several
from lightning_sae.architectures.portable import CONFIG, WEIGHTS
from lightning_sae.files import first_line, read_json
from lightning_sae.loading import load

FIGURES = "results.json"


def push(
    run: str,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    message: str = "SAEs trained with lightning-sae",
) -> str:
    """Upload the SAE of a run, or all SAEs of a run of several, to a repository on the hub.

    The `results.json` of `test` is included. Several SAEs go into one folder each, which
    `lightning_sae.load("owner/name/folder")` reads. A model card states how to load them, their
    training data and settings, and their metrics.

    Args:
        run: Folder of a run, or of an SAE.
        repo_id: `owner/name`; the repository is created if missing.
        private: Whether a new repository is private.
        branch: Branch to commit to.
        message: Message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: If `run` holds no SAE, or a damaged one.
        OSError: If the upload fails.
    """
    found = saes_of(Path(run))
    for sae, _ in found.values():
        load(sae)  # refuses damaged files
    api = HfApi()
    with TemporaryDirectory() as made:
        card = _gathered(found, repo_id, Path(made))
        card.save(Path(made, "README.md"))
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=made, commit_message=message, revision=branch
            )
        except Exception as error:  # errors of the network or the hub, of many types
            raise OSError(
                f"Could not push to {repo_id}: {first_line(error)}. Nothing here was changed; log "
                "in with `hf auth login`, or look at the name and the network."
            ) from error
    return str(commit)


def saes_of(run: Path) -> dict[str, tuple[Path, Path | None]]:
    """The SAEs of a run and their metrics, by target folder; "" is the root.

    Raises:
        ValueError: If there is none.
    """
    if _is_sae(run):
        return {"": (run, _newest(run.parent.glob("results*.json")))}
    own = _newest(folder for folder in run.glob("sae*") if _is_sae(folder))
    if own is not None:
        return {"": (own, _newest(run.glob("results*.json")))}
    members: dict[str, tuple[Path, Path | None]] = {}
    for member in sorted(path for path in (run / "members").glob("*") if path.is_dir()):
        own = _newest(folder for folder in member.glob("sae*") if _is_sae(folder))
        if own is not None:
            members[member.name] = own, _newest(member.glob("results*.json"))
    if not members:
        raise ValueError(
            f"Expected argument `run` to be the folder of an SAE or of a run with `sae` or "
            f"`members` in it but {run} has neither: give a folder that `fit` or "
            "`save_pretrained` wrote."
        )
    return members


def _is_sae(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _gathered(found: dict[str, tuple[Path, Path | None]], repo_id: str, root: Path) -> ModelCard:
    """Copy all files of the repository to `root`; return the model card."""
    descriptions: dict[str, dict[str, Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, (sae, results) in found.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        for file in (CONFIG, WEIGHTS):
            shutil.copy(sae / file, folder / file)
        descriptions[name] = read_json(sae / CONFIG)
        if results is not None:
            shutil.copy(results, folder / FIGURES)
            figures[name] = read_json(results)
    if list(found) == [""]:
        return card_of(descriptions[""], repo_id, figures.get(""))
    return card_of_several(descriptions, repo_id, figures)


def main(args: list[str]) -> None:
    """Run `lightning-sae push`."""
    commit = auto_cli(push, args=args, prog="lightning-sae push")
    sys.stdout.write(f"\nPushed. Made:\n  {commit}\n")
