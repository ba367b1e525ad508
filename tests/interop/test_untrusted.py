"""Others' files, damaged or made to do harm: nothing runs, nothing is written, no memory is taken.

`LIGHTNING_SAE_DAMAGED_FILES=10000` tries so many, at random; in about ten minutes.
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lightning_sae
from lightning_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from lightning_sae.interop import export

N = int(os.environ.get("LIGHTNING_SAE_DAMAGED_FILES", "200"))
PLAIN = N <= 1000


class Original(NamedTuple):
    """A sound SAE in some format."""

    folder: Path
    files: list[str]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    """A folder of each format and architecture, and one of this package's."""
    root = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    relu, topk, jump = ReLUSAE(4, 8), TopKSAE(4, 8, k=2), JumpReLUSAE(4, 8)
    batch, nested = BatchTopKSAE(4, 8, k=2), MatryoshkaSAE(4, 8, k=2, prefixes=(3, 8))
    formats: list[tuple[str, Any]] = [
        *(("saelens", sae) for sae in (relu, topk, jump, GatedSAE(4, 8))),
        *(
            ("dictionary_learning", sae)
            for sae in (relu, topk, batch, nested, GatedSAE(4, 8), jump)
        ),
        ("sparsify", topk),
        ("gemma_scope", jump),
        *(("llama_scope", sae) for sae in (relu, topk, jump)),
        ("openai", relu),
    ]
    found = []
    for i, (format, sae) in enumerate(formats):
        sae.source = {"model": "m", "hook_name": "blocks.1.hook_resid_post", "context_length": 8}
        found.append(export(sae, root / f"{i}-{format}", format))
    found += [
        topk.save_pretrained(root / "ours"),
        _old_llama(found[-4], root),
        _gemma_2(jump, root),
    ]
    return [Original(f, sorted(str(p.relative_to(f)) for p in f.rglob("*.*"))) for f in found]


def _old_llama(new: Path, root: Path) -> Path:
    folder = root / "old-llama"
    (folder / "checkpoints").mkdir(parents=True)
    w = load_file(new / "sae_weights.safetensors")
    content = {"encoder.weight": w["W_E"].T, "encoder.bias": w["b_E"], "decoder.weight": w["W_D"].T}
    content = {name: tensor.contiguous() for name, tensor in content.items()}
    save_file({**content, "decoder.bias": w["b_D"]}, folder / "checkpoints" / "final.safetensors")
    config = {
        "d_model": 4,
        "d_sae": 8,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.1,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.0, "out": 2.0},
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    return folder


def _gemma_2(sae: JumpReLUSAE, root: Path) -> Path:
    folder = root / "gemma-2"
    folder.mkdir()
    w = {"w_enc": sae.W_enc, "b_enc": sae.b_enc, "w_dec": sae.W_dec, "b_dec": sae.b_dec}
    content = {n: t.detach().contiguous() for n, t in {**w, "threshold": sae.threshold}.items()}
    save_file(content, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.1.output", "width": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Damage. Each strategy chooses by `draw`, so that hypothesis can find the simplest that fails.

Draw = Callable[[Any], Any]


def damage_bytes(draw: Draw, path: Path) -> None:
    """Change, cut or add bytes anywhere."""
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, max(0, len(content) - 1)))
    n, new = draw(st.sampled_from([0, 1, 8, 200])), draw(st.binary(max_size=16))
    content[at : at + n] = new
    path.write_bytes(content if draw(st.booleans()) else content[: at + len(new)])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**12, -(10**400), 10**400, 2**63])
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["topk", "gated", "relu", "\n", "dataset-wise", "BatchTopKSAE", "none"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def damage_json(draw: Draw, path: Path) -> None:
    """Give an entry another value, or remove it, or put another thing in place of all."""
    content = json.loads(path.read_text())
    holders = [content, *(v for v in content.values() if isinstance(v, dict) and v)]
    holder = draw(st.sampled_from(holders))
    key = draw(st.sampled_from(sorted(holder)))
    if draw(st.booleans()):
        holder[key] = draw(VALUES)
    else:
        del holder[key]
    path.write_text(json.dumps(content if draw(st.integers(0, 20)) else draw(VALUES)))


def damage_tensor(draw: Draw, path: Path) -> None:
    """Write a sound file in which a tensor has another shape, dtype, value or name."""
    content = CONTENTS[path.suffix][0](path)
    name = draw(st.sampled_from(sorted(content)))
    how = draw(st.sampled_from(["shape", "dtype", "nan", "name", "missing", "empty", "scalar"]))
    tensor = torch.as_tensor(content.pop(name)) if how != "value" else content.pop(name)
    changed = {
        "shape": lambda: torch.zeros(draw(st.lists(st.integers(0, 9), max_size=3))),
        "dtype": lambda: tensor.to(draw(st.sampled_from(DTYPES))),
        "nan": lambda: torch.full_like(tensor.float(), draw(st.sampled_from([float("nan"), 1e38]))),
        "empty": lambda: tensor.new_zeros((0, *tensor.shape[1:])),
        "scalar": lambda: torch.tensor(draw(st.integers(-5, 5))),
    }
    if how == "name":
        content[f"{name}_2"] = tensor
    elif how != "missing":
        content[name] = changed[how]()
    CONTENTS[path.suffix][1](content, path)


DTYPES = torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16
CONTENTS: dict[str, tuple[Callable, Callable]] = {
    ".safetensors": (load_file, save_file),
    ".npz": (
        lambda path: {n: torch.from_numpy(a) for n, a in np.load(path).items()},
        lambda content, path: np.savez(path, **{n: t.numpy() for n, t in content.items()}),
    ),
    ".pt": (
        lambda path: {
            n: t
            for n, t in torch.load(path, weights_only=True).items()
            if isinstance(t, torch.Tensor)
        },
        torch.save,
    ),
}


def loaded(folder: Path) -> tuple[Any, str]:
    """The SAE, or None and why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lightning_sae.load(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error)


@pytest.mark.usefixtures("unchecked")
@given(data=st.data())
@settings(
    max_examples=N,
    deadline=None,
    derandomize=PLAIN,
    database=None,
    suppress_health_check=[*HealthCheck],
)
def test_what_is_damaged_is_refused_in_one_line_or_read(
    data: st.DataObject, originals: list[Original], tmp_path: Path
) -> None:
    original = data.draw(st.sampled_from(originals))
    name = data.draw(st.sampled_from(original.files))
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    folder = shutil.copytree(original.folder, place / "sae")
    path = folder / name
    kinds = [damage_bytes, damage_json if path.suffix == ".json" else damage_tensor]
    data.draw(st.sampled_from(kinds))(data.draw, path)
    before = sorted(place.rglob("*"))
    sae, refused = loaded(folder)
    if sae is None:
        assert "\n" not in refused
        assert str(folder) in refused
    else:
        assert all(torch.isfinite(weight).all() for weight in sae.parameters())
        assert sae(torch.zeros(1, sae.d_in)).shape == (1, sae.d_in)
    assert sorted(place.rglob("*")) == before


@pytest.mark.usefixtures("unchecked")
def test_each_tensor_has_to_fit_the_others(originals: list[Original], tmp_path: Path) -> None:
    for original in originals[:-3] + originals[-2:]:
        for name in original.files:
            path = original.folder / name
            if path.suffix == ".json":
                continue
            for tensor in [*CONTENTS[path.suffix][0](path)]:
                folder = shutil.copytree(original.folder, tmp_path / "sae")
                content = CONTENTS[path.suffix][0](folder / name)
                content[tensor] = content[tensor].new_zeros((0, *content[tensor].shape[1:]))
                CONTENTS[path.suffix][1](content, folder / name)
                found, refused = loaded(folder)
                fits = tensor in IGNORED or tensor.startswith("dataset_average")
                assert found is None or fits, (folder, tensor)
                assert fits or str(folder) in refused
                shutil.rmtree(folder)


IGNORED = (
    "k",
    "threshold",
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
)
"""Tensors that say nothing of an SAE in some format."""


# Files that are made to do harm.


def memory() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def folder_of(originals: list[Original], name: str, to: Path) -> Path:
    found = next(original.folder for original in originals if original.folder.name.endswith(name))
    return shutil.copytree(found, to / "sae")


class Runs:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


class Takes:
    """What takes memory of any size when it is unpickled, and torch lets through."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return bytearray, (2**33,)


def harm_by_code(folder: Path) -> None:
    torch.save({"b_dec": torch.zeros(4), "x": Runs(str(folder / "ran"))}, folder / "ae.pt")


def harm_by_an_old_pickle(folder: Path) -> None:
    (folder / "ae.pt").write_bytes(pickle.dumps(Runs(str(folder / "ran"))))


def harm_by_a_bytearray(folder: Path) -> None:
    torch.save({"b_dec": torch.zeros(4), "x": Takes()}, folder / "ae.pt")


def harm_by_strides(folder: Path) -> None:
    content = torch.load(folder / "ae.pt", weights_only=True)
    content["encoder.weight"] = torch.zeros(1).expand(2**32, 4)
    torch.save(content, folder / "ae.pt")


def harm_by_a_safetensors_header(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"W_enc": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(64)
    (folder / "sae_weights.safetensors").write_bytes(content)


def harm_by_a_long_header(folder: Path) -> None:
    content = struct.pack("<Q", 2**40) + b"{}"
    (folder / "sae_weights.safetensors").write_bytes(content)


def npy(shape: tuple[int, ...], n_bytes: int, dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    return file.getvalue() + bytes(n_bytes)


def harm_by_an_array_header(folder: Path) -> None:
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy((2**20, 2**20), 64))


def harm_by_a_bomb(folder: Path) -> None:
    with (
        zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w") as member,
    ):
        member.write(npy((2**24,), 2**26))


def harm_by_objects(folder: Path) -> None:
    array = np.array([Runs(str(folder / "ran"))], dtype=object)
    np.savez(folder / "params.npz", W_enc=array)  # with a pickle inside


def harm_by_a_large_description(folder: Path) -> None:
    with (folder / "cfg.json").open("wb") as file:
        file.truncate(2**31)


@pytest.mark.parametrize(
    ("harm", "name", "message"),
    [
        (harm_by_code, "dictionary_learning", "only tensors are read"),
        (harm_by_an_old_pickle, "dictionary_learning", "not an archive of `torch.save`"),
        (harm_by_a_bytearray, "dictionary_learning", "bytearray, and only tensors are read"),
        (harm_by_strides, "4-dictionary_learning", r"shape \(4294967296, 4\) has fewer values"),
        (harm_by_a_safetensors_header, "saelens", "damaged"),
        (harm_by_a_long_header, "saelens", "damaged"),
        (harm_by_an_array_header, "gemma_scope", "says shape .* and has other bytes"),
        (harm_by_a_bomb, "gemma_scope", "claim to hold"),
        (harm_by_objects, "gemma_scope", "damaged or not an npz"),
        (harm_by_a_large_description, "saelens", "too many for a description"),
    ],
)
def test_harm_is_refused_without_memory_or_code(
    harm: Callable[[Path], None],
    name: str,
    message: str,
    originals: list[Original],
    tmp_path: Path,
) -> None:
    folder = folder_of(originals, name, tmp_path)
    harm(folder)
    before = memory()
    with pytest.raises(ValueError, match=message):
        lightning_sae.load(folder)
    assert memory() - before < 2**25
    assert not (folder / "ran").exists()
