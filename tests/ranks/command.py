"""`lightning-sae` as each of two ranks runs it, on a few words of text; and what may go wrong."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

STEPS = 10

CONFIG = """
trainer:
  default_root_dir: {root}
  accelerator: cpu
  strategy: {strategy}
  devices: {devices}
  max_steps: {steps}
  val_check_interval: 4
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  enable_model_summary: false
  logger: false
  callbacks:
    - class_path: lightning_sae.callbacks.DecoderNormProjection
    - class_path: lightning_sae.callbacks.DeadFeatureResampling
      init_args: {{every_n_steps: 5, n_inputs: 256}}
{more}
checkpoint: {{every_n_steps: 2}}
progress_bar: {{refresh_rate: 0}}
evaluation: {{n_tokens: 512}}
model:
  class_path: lightning_sae.ReLUSAE
  init_args: {{d_sae: 256, l1_coefficient: 60.0, lr: 0.003, dead_after: 500}}
data:
  class_path: lightning_sae.ActivationDataModule
  init_args:
    hook_name: blocks.1.hook_resid_post
    text: {text}
    validation_fraction: 0.3
    context_length: 32
    blocks_per_pass: 2
    batch_size: 48
    buffer_size: 240
    center: true
    scale: true
    n_validation: 128
    n_test: 256
"""


class KillRank(Callback):
    """Kills a rank in a step, as a machine that fails does."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def write_config(
    root: Path, *, more: str = "", devices: int = 2, steps: int = STEPS, strategy: str = "ddp"
) -> Path:
    """A configuration of a run in `root`, beside it, on `text.txt` beside it too."""
    path, text = root.with_suffix(".yaml"), root.parent / "text.txt"
    given = {"more": more, "devices": devices, "steps": steps, "strategy": strategy}
    path.write_text(CONFIG.format(root=root, text=text, **given))
    return path


def kill(rank: int, step: int) -> str:
    """The entry for `KillRank` among the callbacks."""
    kind = "tests.ranks.command.KillRank"
    return f"    - class_path: {kind}\n      init_args: {{rank: {rank}, step: {step}}}"


def resumable(last: Path) -> list[str]:
    """Arguments that go on from a checkpoint, if it is there."""
    return ["--ckpt_path", str(last)] if last.exists() else []
