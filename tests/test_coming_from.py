"""The names of this package in docs/coming_from.md are its own."""

import inspect
import re
from pathlib import Path

import yaml

import lightning_sae
from lightning_sae import callbacks
from lightning_sae.callbacks import RunCheckpoint
from lightning_sae.metrics import held_out_metrics


def arguments(*kinds: type) -> set[str]:
    """Of these classes and their bases."""
    of_bases = (vars(base).get("__init__") for kind in kinds for base in kind.__mro__)
    return {name for init in of_bases if init for name in inspect.signature(init).parameters}


def test_every_setting_class_and_metric_named_is_there(repository: Path) -> None:
    page = (repository / "docs" / "coming_from.md").read_text()
    saes = [getattr(lightning_sae, name) for name in lightning_sae.architectures.__all__]
    of = {
        "data": arguments(lightning_sae.ActivationDataModule),
        "model": arguments(*saes),
        "checkpoint": arguments(RunCheckpoint),
    }
    named = re.findall(r"`(data|model|checkpoint)\.(\w+)`", page)
    assert len(named) > 30
    assert [f"{group}.{name}" for group, name in named if name not in of[group]] == []
    rows = [row.split("|")[2] for row in page.splitlines() if row.startswith("|")]
    ours = {name for row in rows for name in re.findall(r"`([A-Z]\w+(?:SAE|Module))\b", row)}
    assert ours <= set(lightning_sae.__all__)
    for name in re.findall(r"callback `(\w+)", page):
        assert name in callbacks.__all__
    metrics = held_out_metrics(1, 1)
    for name in ("l0", "mse", "fvu", "explained_variance", "l2_ratio", "cosine_similarity"):
        assert name in metrics
        assert f"`{name}`" in page


def defaults_of(*kinds: type) -> dict[str, set[object]]:
    """Default values of the arguments of these classes and their bases."""
    found: dict[str, set[object]] = {}
    for init in (vars(base).get("__init__") for kind in kinds for base in kind.__mro__):
        for name, parameter in inspect.signature(init).parameters.items() if init else ():
            found.setdefault(name, set()).add(parameter.default)
    return found


def test_every_default_named_is_the_one_in_force(repository: Path) -> None:
    page = (repository / "docs" / "coming_from.md").read_text()
    saes = [getattr(lightning_sae, name) for name in lightning_sae.architectures.__all__]
    of = {"data": defaults_of(lightning_sae.ActivationDataModule), "model": defaults_of(*saes)}
    # A name and its value, alone in their cell or with a comma after them; bold where it differs.
    stated = re.findall(r"`(data|model)\.(\w+)` \**`?([\w./-]+(?:,\d{3})*)`?\**(?=[ ,|])", page)
    assert len(stated) > 20
    for group, name, text in stated:
        words = text.replace(",", "")
        value = words if not words.startswith("1/") else str(1 / int(words[2:]))
        assert yaml.safe_load(value) in of[group][name], f"{group}.{name} {text}"
