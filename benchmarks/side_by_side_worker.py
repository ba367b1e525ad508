"""Run one job of the side-by-side benchmark in this process and write its figures as JSON.

The jobs: train many SAEs in one run, train each in a run of its own, and run the language model
alone. `python -m benchmarks.side_by_side_worker '{"job": ...}' RESULT`, which
`benchmarks.side_by_side` starts.
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
    """Which SAEs are trained, on what data, and for how many steps.

    Attributes:
        hooks: Where activations are read.
        architectures: Classes of this package that have an `l1_coefficient`.
        coefficients: Values of `l1_coefficient`, each used with every architecture and hook.
        steps: Optimizer steps of a run.
        d_sae: Number of latents of each SAE.
        lr: Learning rate.
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
        """The data module, with its model loaded and its text opened."""
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
        """Descriptions of the members, in the form of a YAML config."""
        callbacks = "lightning_sae.callbacks."
        n_steps = max(1, self.steps // 5)
        rates = {"lr": self.lr, "lr_warmup_steps": self.steps // 10, "lr_decay_steps": 0}
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
        """A small version of the plan, run first so that late set-up is not timed."""
        smaller = self._replace(steps=2, d_sae=32, coefficients=self.coefficients[:1])
        return smaller._replace(
            batch_size=64, buffer_size=256, context_length=16, blocks_per_pass=4
        )


class TokensRead(Callback):
    """Remember how many tokens the stream has read when training ends."""

    tokens = 0

    @override
    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.tokens = int(trainer.datamodule.statistics()["seen"])


def together(plan: Plan) -> Row:
    """Train all SAEs in one run.

    Returns:
        `wall` seconds from the call of `fit` until it returns, the number of `tokens` read, and
        the `outcome` of each SAE.
    """
    data, read = plan.data(list(plan.hooks)), TokensRead()
    model = SideBySide(plan.descriptions(plan.architectures, plan.hooks), data.d_in)
    wall = _fit(plan, model, data, [read])
    members = [{"name": each.name, **outcome(each.sae)} for each in model.members]
    return {"wall": wall, "tokens": read.tokens, "members": members, "peak_bytes": peak_bytes()}


def alone(plan: Plan, architecture: str, hook: str) -> Row:
    """Train SAEs of one architecture at one hook, each in its own run, one after another.

    Returns:
        `members`, each with the `wall` seconds of its run and its `outcome`.
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
    """Hash of an SAE's weights, and its L0 on the last batch."""
    digest = hashlib.sha256()
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return {"sha256": digest.hexdigest(), "l0": sae.trainer.callback_metrics["train/l0"].item()}


def language_model(plan: Plan, tokens: int) -> Row:
    """Run the language model alone on `tokens` tokens, up to all hooks and up to each hook.

    Returns:
        `wall` seconds up to the deepest hook, and `walls` up to each hook.
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
    """Run the job that the JSON `call` describes, after a tiny rehearsal, and write its answer."""
    asked = json.loads(call)
    torch.set_num_threads(asked["threads"])
    job, plan, arguments = JOBS[asked["job"]], Plan(**asked["plan"]), asked["arguments"]
    job(plan.tiny(), **arguments | ({"tokens": 64} if "tokens" in arguments else {}))
    Path(result).write_text(json.dumps(job(plan, **arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
