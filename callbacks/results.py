"""Files with the SAE, its metrics and its latents."""

import filecmp
import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from lightning_sae.analysis import evaluate_in_model
from lightning_sae.checks import require_positive
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.source import source_of
from lightning_sae.distributed.split import parts_of
from lightning_sae.files import remove_unfinished, write_atomically


class ExportSAE(Callback):
    """Writes the trained SAE to `<trainer.default_root_dir>/sae` when training ends.

    If that folder exists, for example when a finished run is extended, it writes to `sae-2` and so
    on. A run that was stopped after its last step exports the SAE when it is resumed; an incomplete
    export is replaced.

    Attributes:
        folder: The folder, once it is written.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With nothing left to train, Lightning calls no `on_train_end`.
        if self.folder is None and trainer.ckpt_path is not None:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.default_root_dir)
        if not trainer.is_global_zero:
            self.folder = root / "sae"
            if parts_of(trainer).n > 1:  # gives its part of the weights to rank 0
                pl_module.save_pretrained(self.folder)  # type: ignore[operator]
            return
        for left_over in root.glob(".sae.*"):
            shutil.rmtree(left_over)
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(dir=root, prefix=".sae.")) / "sae"
        try:
            pl_module.save_pretrained(temporary)  # type: ignore[operator]
            self.folder = _put(temporary, root / "sae")
        finally:
            shutil.rmtree(temporary.parent)


def _put(made: Path, folder: Path) -> Path:
    """Move an exported SAE to its folder, unless one with the same files exists; return it."""
    names = sorted(path.name for path in made.iterdir())
    for place in _numbered(folder):
        if not place.exists():
            break
        if not place.is_dir():
            continue
        there = {path.name for path in place.iterdir()}
        if filecmp.cmpfiles(made, place, names, shallow=False)[0] == names:
            return place
        # An incomplete export, and nothing else.
        if not set(names) <= there and all(n in names or n[0] == "." for n in there):
            shutil.rmtree(place)
            break
    return made.rename(place)


class HeldOutEvaluation(Callback):
    """Adds the language model's cross-entropies to `test` and writes all metrics to a file.

    Values are logged as `test/...`, under the same names as in validation, and written to
    `<trainer.default_root_dir>/results.json`, or `results-2.json` and so on if it exists.
    Cross-entropies need data that names its language model and text, as an `ActivationDataModule`
    and a cache do; with other data, or if the model cannot be opened, only the metrics of `test`
    are written. With several ranks, each reads its share of the held-out text, and the results are
    of all ranks.

    Args:
        n_tokens: Approximate number of held-out tokens that the language model reads, on all ranks
            together.
    """

    def __init__(self, n_tokens: int = 65536) -> None:
        require_positive(n_tokens=n_tokens)
        self.n_tokens = n_tokens
        self.path: Path | None = None
        self.results: dict[str, Any] = {}
        self._data: ActivationDataModule | None = None
        self._in_model: dict[str, float] = {}

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the language model now, so that errors come before the test."""
        data = source_of(trainer)
        self._data = None if data is None else data.text_data()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_model = {}
        if self._data is not None:
            self._in_model = evaluate_in_model(pl_module, self._data, self.n_tokens)  # type: ignore[arg-type]
            named = {f"test/{name}": float(value) for name, value in self._in_model.items()}
            pl_module.log_dict(named, sync_dist=True)  # the same on all ranks already
        self._data = None

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        results = {k.removeprefix("test/"): v.item() for k, v in metrics.items() if "test/" in k}
        self.results = results | self._in_model  # not rounded to single precision
        if trainer.is_global_zero:
            remove_unfinished(Path(trainer.default_root_dir), "results*.json")
            self.path = unused(Path(trainer.default_root_dir) / "results.json")
            text = json.dumps(self.results, indent=2) + "\n"
            write_atomically(self.path, lambda path: path.write_text(text))


class LatentWriter(Callback):
    """Writes the latents of `predict` to `<trainer.default_root_dir>/latents`, a file per batch.

    `batch-00000.safetensors` and so on hold the non-zero latents in compressed rows: `values` [n],
    `latents` [n], `starts` [batch + 1] and `d_sae`; those of row i are `starts[i]:starts[i + 1]`.
    With several ranks, the name contains the rank. If the folder exists, `latents-2` is used.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = unused(Path(trainer.default_root_dir) / "latents")
        self.folder = trainer.strategy.broadcast(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Float[Tensor, "batch d_sae"],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self.folder is not None
        rank = f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / f"batch-{batch_idx:05d}{rank}.safetensors"
        rows = compressed_rows(outputs.cpu())
        write_atomically(path, lambda temporary: save_file(rows, temporary))


def compressed_rows(f: Float[Tensor, "batch d_sae"]) -> dict[str, Tensor]:
    """The non-zero entries of `f` row by row; see `LatentWriter`.

    Example:
        >>> rows = compressed_rows(torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 4.0]]))
        >>> rows["values"], rows["latents"], rows["starts"]
        (tensor([2., 3., 4.]), tensor([1, 0, 1]), tensor([0, 1, 1, 3]))
    """
    rows, latents = f.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(f))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    d_sae = torch.tensor(f.shape[1])
    return {"values": f[rows, latents], "latents": latents, "starts": starts, "d_sae": d_sae}


def unused(path: Path) -> Path:
    """`path`, or the first of `name-2`, `name-3`, ... that does not exist."""
    return next(place for place in _numbered(path) if not place.exists())


def _numbered(path: Path) -> Iterator[Path]:
    """`path`, then `name-2`, `name-3` and so on."""
    yield path
    yield from (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in count(2))
