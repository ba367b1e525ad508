"""Damage checkpoints and folders of SAEs at random, and see what reading them gives.

Each must be refused in one line that names the file or the argument, or give just what was written.
Anything else is a fault and is shown: another content in silence, a traceback, or code that ran.
"""

import argparse
import json
import logging
import pickle
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    SideBySide,
    TiedSAE,
    TopKSAE,
    load,
)

D_IN, D_SAE = 8, 48
KINDS = (
    *(ReLUSAE, TiedSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, GatedSAE, JumpReLUSAE),
    *(RescaleAndShiftSAE, RescaledSAE),
)
PLAIN: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


class Outcome(NamedTuple):
    """What came of one damaged input.

    Attributes:
        what: Which input, and how it was damaged.
        how: `refused`, `unharmed`, `silent`, `traceback` or `ran code`.
        message: The error's, if there was one.
    """

    what: str
    how: str
    message: str = ""

    @property
    def is_right(self) -> bool:
        """Whether that is as it should be."""
        return self.how in ("refused", "unharmed")


# What is damaged, and how it is read.


class Original(NamedTuple):
    """Something to be damaged.

    Attributes:
        name: What it is.
        path: A file or a folder.
        read: What reading it gives, as plain values and tensors.
        content: That, undamaged.
    """

    name: str
    path: Path
    read: Callable[[Path], Any]
    content: Any


def originals(root: Path) -> list[Original]:
    """Folders and checkpoints of small SAEs, and a checkpoint of two side by side."""
    found: list[Original] = []

    def add(name: str, path: Path, read: Callable[[Path], Any]) -> None:
        found.append(Original(name, path, read, read(path)))

    for kind in KINDS:
        torch.manual_seed(0)
        sae, name = made(kind), kind.__name__
        trainer = fitted(sae, None, 2)
        sae.source = {"model": "some/model", "hook_name": "blocks.1.hook_resid_post"}
        add(f"folder of a {name}", sae.save_pretrained(root / name / "sae"), loaded)
        path = root / name / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        add(f"checkpoint of a {name}", path, loaded)
        add(f"resume of a {name}", path, partial(resumed, kind))
    pair = [{"name": "a", "sae": ReLUSAE(D_IN, D_SAE)}, {"name": "b", "sae": TopKSAE(D_IN, D_SAE)}]
    path = root / "side-by-side" / "checkpoints" / "last.ckpt"
    fitted(SideBySide(pair), None, 2).save_checkpoint(path)
    add("checkpoint side by side", path, partial(loaded, member="b"))
    return found


def made(kind: Any) -> Any:
    """An SAE of a class."""
    sae = kind(D_IN, D_SAE)
    sae.is_trained = kind is RescaledSAE  # which starts from a trained one
    return sae


def fitted(sae: LightningModule, ckpt_path: Path | None, max_steps: int) -> Trainer:
    """Train for some steps, on data that is always the same."""
    trainer = Trainer(max_steps=max_steps, **PLAIN)
    rows: Any = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0))
    trainer.fit(sae, DataLoader(rows, batch_size=16), ckpt_path=ckpt_path)
    return trainer


def loaded(path: Path, member: str | None = None) -> Any:
    """All that `load` gives."""
    sae = load(path, member=member)
    return {"kind": type(sae).__name__, "source": sae.source, **arguments(sae), **state(sae)}


def resumed(kind: Any, path: Path) -> Any:
    """The weights one step later."""
    sae = made(kind)
    fitted(sae, path, 3)
    return state(sae)


def arguments(sae: LightningModule) -> dict[str, str]:
    """The arguments of an SAE, as text."""
    return {f"argument {name}": str(value) for name, value in sae.hparams.items()}


def state(sae: LightningModule) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: weight.clone() for name, weight in sae.state_dict().items()}


def are_same(one: Any, other: Any) -> bool:
    """Whether two contents are the same in all values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_same(one[k], other[k]) for k in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


# Damage.

Damage = Callable[[Path, random.Random], str]
"""Damages the file or folder at a path, and says how."""


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Damage the bytes of a file, or of one of a folder."""
    if path.is_dir():
        path = rng.choice(sorted(path.iterdir()))
    content, how = bytearray(path.read_bytes()), rng.choice(BYTES)
    at, n = rng.randrange(len(content)), rng.choice([1, 16, 512])
    if how == "a bit":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[at : at + n] = bytes(len(content[at : at + n]))
    elif how == "noise":
        content[at : at + n] = rng.randbytes(len(content[at : at + n]))
    elif how == "cut":
        del content[at:]
    elif how == "gap":
        del content[at : at + n]
    elif how == "more":
        content[at:at] = rng.randbytes(n)
    elif how == "more at the end":
        content += rng.randbytes(n)
    elif how == "another":
        content = bytearray(rng.choice(STRANGERS))
    path.write_bytes(content)
    return f"{path.name}: {how}, at byte {at}, {n} of them"


BYTES = "a bit", "zeros", "noise", "cut", "gap", "more", "more at the end", "another"

STRANGERS = b"", b"text", b"\x80\x02}q\x00.", b"PK\x05\x06" + bytes(18)

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**12, 1e300, float("nan"), "", "x", [], {}, [1, "a"], {"a": None},
)  # fmt: skip


def damage_json(path: Path, rng: random.Random) -> str:
    """Change, remove or add a value somewhere in `config.json`."""
    content = json.loads((path / "config.json").read_text())
    holder, key = _place(content, rng)
    said = _change(holder, key, rng)
    (path / "config.json").write_text(json.dumps(content))
    return f"config.json: {said}"


def _place(content: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A dictionary in `content`, and one of its keys."""
    while True:
        key = rng.choice(sorted(map(str, content)))
        if not isinstance(content[key], dict) or not content[key] or rng.random() < 0.2:
            return content, key
        content = content[key]


def _change(holder: dict[str, Any], key: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        del holder[key]
        return f"{key} removed"
    if rng.random() < 0.2:
        holder[f"{key}_2"] = holder[key]
        return f"{key}_2 added"
    holder[key] = rng.choice(VALUES)
    return f"{key} = {holder[key]!r}"


def damage_weights(path: Path, rng: random.Random) -> str:
    """Write other weights, half the time beside a description without checksums."""
    weights = load_file(path / "sae.safetensors")
    name, how = rng.choice(sorted(weights)), rng.choice(WEIGHTS)
    weight = weights[name]
    if how in ("nan", "inf"):
        weight.view(-1)[rng.randrange(weight.numel())] = float(how)
    elif how == "shape":
        weights[name] = torch.zeros(*weight.shape, 3)
    elif how == "dtype":
        weights[name] = weight.to(torch.int32)
    elif how == "removed":
        del weights[name]
    elif how == "added":
        weights[f"{name}_2"] = weight.clone()
    save_file(weights, path / "sae.safetensors")
    old = rng.random() < 0.5
    if old:
        content = json.loads((path / "config.json").read_text())
        del content["checksums"]
        (path / "config.json").write_text(json.dumps(content))
    return f"sae.safetensors: {name}, {how}{', no checksums' if old else ''}"


WEIGHTS = "nan", "inf", "shape", "dtype", "removed", "added"


def damage_entries(path: Path, rng: random.Random) -> str:
    """Write a checkpoint, sound as a file, in which an entry is of a wrong type or not finite."""
    content = torch.load(path, weights_only=True)
    name = rng.choice([name for name in ENTRIES if name in content])
    if name == "state_dict":
        key = rng.choice(sorted(content[name]))
        weight = content[name][key]
        wrong = torch.full_like(weight, float("nan")) if weight.is_floating_point() else None
        content[name][key] = rng.choice([wrong, None, 3, torch.zeros(3, 1, 2), "x"])
    else:
        key = name
        wrong_types = [v for v in VALUES if type(v) is not type(content[name]) and v is not True]
        content[name] = rng.choice(wrong_types)
    torch.save(content, path)
    return f"{name}, {key} wrong"


ENTRIES = "state_dict", "lightning_sae", "hyper_parameters", "members", "loops", "epoch"


class RunsCode:
    """What runs code when it is unpickled: here, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.mkdir, (Path(self.folder),)  # type: ignore[return-value]


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a checkpoint."""
    how = rng.choice(OTHERS)
    content = torch.load(path, weights_only=True)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "text":
        path.write_text("step,loss\n1,2.0\n")
    elif how == "another archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif how == "no archive":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(f"{path}.ran")))
    elif how == "code":
        torch.save({**content, "extra": RunsCode(f"{path}.ran")}, path)
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "tensor":
        torch.save(torch.zeros(3), path)
    else:
        torch.save(torch.nn.Linear(2, 2), path)
    return how


OTHERS = (
    "folder", "text", "another archive", "no archive", "pickle", "code", "list", "tensor", "module",
)  # fmt: skip


# The trial.


def try_one(original: Original, damage: Damage, place: Path, rng: random.Random) -> Outcome:
    """Damage a copy and read it."""
    shutil.rmtree(place, ignore_errors=True)
    path = place / original.path.name
    if original.path.is_dir():
        shutil.copytree(original.path, path)
    else:
        place.mkdir(parents=True)
        shutil.copy(original.path, path)
    what = f"{original.name}, {damage(path, rng)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = original.read(path)
    except (ValueError, OSError, FloatingPointError) as error:
        outcome = Outcome(what, _how_refused(error, path), str(error))
    except Exception as error:
        outcome = Outcome(what, "traceback", f"{type(error).__name__}: {error}")
    else:
        expected = original.content
        if damage is damage_entries:  # no reader can know that another value was meant
            content, expected = _weights(content), _weights(expected)
        outcome = Outcome(what, "unharmed" if are_same(content, expected) else "silent")
    return outcome._replace(how="ran code") if Path(f"{path}.ran").exists() else outcome


def _how_refused(error: Exception, path: Path) -> str:
    one_line = "\n" not in str(error)
    named = str(path.parent) in str(error) or "`ckpt_path`" in str(error)
    return "refused" if one_line and named else "traceback"


def _weights(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def damages_of(original: Original) -> list[Damage]:
    """How something can be damaged."""
    if original.path.is_dir():
        return [damage_bytes, damage_json, damage_weights]
    return [damage_bytes, damage_bytes, damage_entries, replace_file]


def trials(n: int, seed: int, root: Path) -> list[Outcome]:
    """Damage and read `n` inputs, of all kinds in turn."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng, every = random.Random(seed), originals(root / "originals")
    found = []
    for i in range(n):
        original = every[i % len(every)]
        damage = rng.choice(damages_of(original))
        found.append(try_one(original, damage, root / "damaged", rng))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials and report; the exit status is 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="damaged inputs")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        found = trials(asked.n, asked.seed, Path(root))
    faults = [outcome for outcome in found if not outcome.is_right]
    counts = Counter(outcome.how for outcome in found)
    lines = [f"{o.how.upper()}: {o.what}: {o.message[:300]}" for o in faults]
    of_each = ", ".join(f"{n} {how}" for how, n in sorted(counts.items()))
    lines.append(f"{len(found)} damaged inputs: {of_each}; {len(faults)} faults.")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
