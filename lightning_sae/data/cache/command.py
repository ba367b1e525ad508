"""`lightning-sae cache`: the activations of a text, written to the disk."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.fabric import Fabric

from lightning_sae.checks import require_positive
from lightning_sae.data.cache.manifest import read_manifest
from lightning_sae.data.cache.plan import hours, size
from lightning_sae.data.cache.write import SHARD_BYTES, write_cache
from lightning_sae.data.datamodule import ActivationDataModule

OF_TRAINER = ("accelerator", "devices", "num_nodes")
OF_RUNS = (
    "seed_everything",
    "trainer",
    "checkpoint",
    "progress_bar",
    "evaluation",
    "model",
    "optimizer",
    "lr_scheduler",
    "ckpt_path",
    "weights_only",
    "config",
)
"""Parts of a run's configuration that this command ignores."""

DATA = "lightning_sae.ActivationDataModule"


def cache(
    data: ActivationDataModule,
    output: str,
    *,
    tokens: int | None = None,
    held_out: int | None = None,
    shard_mib: int = SHARD_BYTES // 2**20,
    plan_only: bool = False,
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    num_nodes: int = 1,
) -> None:
    """Write the activations of a text to disk, for all hooks in one pass of the language model.

    First it prints the estimated rows, bytes and hours; it stops if the disk has too little space.
    If interrupted, by Ctrl-C or otherwise, the same command continues from the last complete shard.
    With more `--tokens`, a complete cache is extended. `CachedDataModule` trains on it.

    Args:
        data: The language model, its hooks, text and filter.
        output: Folder of the cache: new, or one to continue.
        tokens: Approximate number of training tokens to read; null for one pass over the text.
        held_out: Approximate number of held-out tokens to read; null for `data.n_test`.
        shard_mib: Approximate size of a shard in MiB.
        plan_only: Print the estimate, and write nothing.
        accelerator: As Lightning's `Trainer` takes it.
        devices: Number or list of devices per machine; each writes its share.
        num_nodes: Number of machines.
    """
    require_positive(shard_mib=shard_mib)
    started = time.perf_counter()
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)
    fabric.launch()
    try:
        folder = write_cache(
            data,
            output,
            tokens=tokens,
            held_out=held_out,
            shard_bytes=shard_mib * 2**20,
            plan_only=plan_only,
            fabric=fabric,
        )
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            sys.stderr.write(
                f"\nStopped. {output} has all complete shards: the same command continues there.\n"
            )
        sys.exit(130)
    if fabric.is_global_zero:
        _tell(folder, plan_only, time.perf_counter() - started)


def _tell(folder: Path, plan_only: bool, seconds: float) -> None:
    if plan_only:
        sys.stdout.write("\nWrote nothing, as `--plan_only` asks.\n")
        return
    manifest = read_manifest(folder)
    training, held_out = manifest.rows("training"), manifest.rows("held_out")
    words = ["lightning-sae", "fit", "--model", "TopKSAE", "--data", "CachedDataModule"]
    words += ["--data.activations", str(folder)]
    hooks = [*manifest.widths]
    if len(hooks) > 1:  # an SAE takes one
        words += ["--data.hook_name", hooks[0]]
    words += ["--trainer.max_steps", "1000"]
    sys.stdout.write(
        f"\nCached {training:,} activations to train on and {held_out:,} held out, "
        f"{size(manifest.nbytes())}, in {hours(seconds)}.\nMade:\n"
        f"  {folder}  shards, and manifest.json, which describes them\n"
        f"Next:\n  {shlex.join(words)}\n"
    )


def of_cache(config: str) -> str:
    """The arguments of this command in a configuration file, of a run or of the command, as JSON.

    Args:
        config: A file, or its text.
    """
    text = config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise ValueError(f"Could not read {config}: it holds no configuration.")
    _require_text(found.get("data"))
    trainer: dict[str, Any] = found.get("trainer") or {}
    own = {name: trainer[name] for name in OF_TRAINER if name in trainer}
    given = {name: value for name, value in found.items() if name not in OF_RUNS}
    return json.dumps({**own, **given})


def _require_text(data: Any) -> None:
    kind = str(data.get("class_path", "")) if isinstance(data, dict) else ""
    if kind.rpartition(".")[2] in ("CachedDataModule", "ToyDataModule"):
        raise ValueError(
            f"Expected argument `config` to have data that a language model reads from text, an "
            f"ActivationDataModule, but it has a {kind}: give the configuration of another run."
        )


def main(args: Sequence[str]) -> None:
    """Run `lightning-sae cache`."""
    parser = ArgumentParser(
        prog="lightning-sae cache", description=str(cache.__doc__).split("Args:")[0]
    )
    parser.add_argument("--config", "-c", action=ActionConfigFile, help="A run's, or its own.")
    parser.add_function_arguments(cache, sub_configs=True, skip={"data"})
    parser.add_subclass_arguments(ActivationDataModule, "data", required=True)
    parser.set_defaults({"data": {"class_path": DATA}})
    given = parser.instantiate(parser.parse_args(_with_configs(args)))
    arguments = {name: value for name, value in vars(given).items() if name != "config"}
    cache(**arguments)


def _with_configs(args: Sequence[str]) -> list[str]:
    result: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            arg = f"{name}={of_cache(value)}"
        elif result and result[-1] in ("--config", "-c"):
            arg = of_cache(arg)
        result.append(arg)
    return result
