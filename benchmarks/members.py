"""Many SAEs in one run, and each in one of its own; each job is a process.

`python -m benchmarks.members '{"job": ...}' RESULT`.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from benchmarks.libraries.ours import QUIET
from benchmarks.measure import peak_bytes
from lightning_sae import ActivationDataModule, SideBySide
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.side_by_side.descriptions import build_members

Row = dict[str, Any]


class Plan(NamedTuple):
    """Which SAEs are trained, on what, and for how long.

    Attributes:
        hooks: Where activations are read.
        architectures: Classes of this package that have an `l1_coefficient`.
        coefficients: Its values, of each architecture at each hook.
        steps: Optimiser steps of a run.
        d_sae: Latents of each.
        lr: Their learning rate.
        model: A `transformers` folder, or `embedded`.
        text: A text file, or `embedded`.
        batch_size: Activations in a batch.
        buffer_size: Activations in the shuffling buffer.
        context_length: Tokens in a block.
        blocks_per_pass: Blocks in a forward pass.
    """

    hooks: Sequence[str] = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    architectures: Sequence[str] = ("ReLUSAE", "GatedSAE")
    coefficients: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
    steps: int = 150
    d_sae: int = 1024
    lr: float = 1e-3
    model: str = "embedded"
    text: str = "embedded"
    batch_size: int = 2048
    buffer_size: int = 65536
    context_length: int = 128
    blocks_per_pass: int = 32

    def data(self, hook_name: str | list[str]) -> ActivationDataModule:
        """The stream, with its model loaded and its text opened."""
        data = ActivationDataModule(
            hook_name,
            self.model,
            text=self.text,
            batch_size=self.batch_size,
            buffer_size=self.buffer_size,
            context_length=self.context_length,
            blocks_per_pass=self.blocks_per_pass,
            center=True,
            scale=True,
        )
        data.training_blocks().read(1)
        return data

    def descriptions(self, architectures: Sequence[str], hooks: Sequence[str]) -> list[Row]:
        """Members as one describes them in YAML."""
        callbacks = "lightning_sae.callbacks."
        n_steps = max(1, self.steps // 5)
        rates = {"lr": self.lr, "lr_warmup_steps": self.steps // 10}
        return [
            {
                "name": name,
                "seed": 0,
                "sae": {
                    "class_path": f"lightning_sae.{name}",
                    "init_args": {"d_sae": self.d_sae, **rates},
                },
                "callbacks": [
                    {"class_path": f"{callbacks}DecoderNormProjection"},
                    {"class_path": f"{callbacks}L1Warmup", "init_args": {"n_steps": n_steps}},
                ],
                "sweep": {"hook_name": list(hooks), "l1_coefficient": list(self.coefficients)},
            }
            for name in architectures
        ]

    def tiny(self) -> "Plan":
        """A few steps of the same, so that nothing is set up late in what is timed."""
        smaller = self._replace(steps=2, d_sae=32, coefficients=self.coefficients[:1])
        return smaller._replace(
            batch_size=64, buffer_size=256, context_length=16, blocks_per_pass=4
        )


class Seen(Callback):
    """How many tokens the stream had read when training ended."""

    tokens = 0

    @override
    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.tokens = int(trainer.datamodule.statistics()["seen"])


def together(plan: Plan) -> Row:
    """All SAEs in one run.

    Returns:
        `wall` seconds from the call of `fit` until it returns, the `tokens` that it read, and what
        each SAE has become.
    """
    data, seen = plan.data(list(plan.hooks)), Seen()
    model = SideBySide(plan.descriptions(plan.architectures, plan.hooks), data.d_in)
    wall = _fit(plan, model, data, [seen])
    members = [{"name": each.name, **outcome(each.sae)} for each in model.members]
    return {"wall": wall, "tokens": seen.tokens, "members": members, "peak_bytes": peak_bytes()}


def alone(plan: Plan, architecture: str, hook: str) -> Row:
    """SAEs of one architecture at one hook, each in a run of its own, one after another.

    Returns:
        `members`, each with the `wall` seconds of its run and what it has become.
    """
    found = []
    for i in range(len(plan.coefficients)):
        data = plan.data(hook)
        member = build_members(plan.descriptions([architecture], [hook]), data.d_in)[i]
        wall = _fit(plan, member.sae, data, member.callbacks)
        found.append({"name": member.name, "wall": wall, **outcome(member.sae)})
    return {"members": found, "peak_bytes": peak_bytes()}


def _fit(plan: Plan, model: Any, data: ActivationDataModule, callbacks: list[Callback]) -> float:
    trainer = Trainer(max_steps=plan.steps, limit_val_batches=0, callbacks=callbacks, **QUIET)
    began = perf_counter()
    trainer.fit(model, datamodule=data)
    return perf_counter() - began


def outcome(sae: SparseAutoencoder) -> Row:
    """A fingerprint of an SAE's weights, and the latents that its last batch had active."""
    digest = hashlib.sha256()
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return {"sha256": digest.hexdigest(), "l0": sae.trainer.callback_metrics["train/l0"].item()}


def language_model(plan: Plan, tokens: int) -> Row:
    """The language model alone, on so many tokens, up to all hooks and up to each.

    Returns:
        `wall` seconds up to the deepest hook, and `walls` up to each.
    """
    data = plan.data(list(plan.hooks))
    blocks = data.training_blocks()
    passes = max(1, round(tokens / (plan.blocks_per_pass * plan.context_length)))
    read = [blocks.read(plan.blocks_per_pass) for _ in range(passes)]
    models = [data.language_model, *(plan.data(hook).language_model for hook in plan.hooks)]
    walls = []
    for model in models:
        model.activations(read[0])
        began = perf_counter()
        for each in read:
            model.activations(each)
        walls.append(perf_counter() - began)
    return {"wall": walls[0], "walls": dict(zip(plan.hooks, walls[1:], strict=True))}


JOBS: dict[str, Callable[..., Row]] = {
    "together": together,
    "alone": alone,
    "language_model": language_model,
}


def main(call: str, result: str) -> None:
    """Run the job that `call` describes, after a tiny one of its kind, and write its answer."""
    asked = json.loads(call)
    torch.set_num_threads(asked["threads"])
    job, plan, arguments = JOBS[asked["job"]], Plan(**asked["plan"]), asked["arguments"]
    job(plan.tiny(), **arguments | ({"tokens": 64} if "tokens" in arguments else {}))
    Path(result).write_text(json.dumps(job(plan, **arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
