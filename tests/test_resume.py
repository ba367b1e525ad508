"""A run that is killed and resumed gives the weights of one that was not, bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae.cli import main

KILLER = """
import os, signal
from lightning.pytorch.callbacks import Callback

class KillAt(Callback):
    def __init__(self, step: int, signal_name: str = "SIGKILL"):
        self.step, self.signal = step, getattr(signal, signal_name)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)
"""

# `lightning-sae fit` for each configuration, one after another, each in a process of its own. It is
# forked, because importing takes longer than the run.
EACH_IN_A_PROCESS = """
import json, os, sys
from lightning_sae.cli import command

statuses = []
for config in sys.argv[1:]:
    process = os.fork()
    if not process:
        sys.argv[1:] = ["fit", "--config", config]
        status = 0
        try:
            command()
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(statuses))
"""

# Everything with a memory takes part: buffer, prefetch, centring, resampling, warm-ups, decay,
# accumulation, and a validation in between.
CONFIG = """
trainer:
  default_root_dir: {root}
  accelerator: cpu
  max_steps: 14
  accumulate_grad_batches: 2
  val_check_interval: 10
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  enable_model_summary: false
  logger: false
  callbacks:
    - class_path: lightning_sae.callbacks.DecoderNormProjection
    - class_path: lightning_sae.callbacks.L1Warmup
      init_args: {{n_steps: 9}}
    - class_path: lightning_sae.callbacks.DeadFeatureResampling
      init_args: {{every_n_steps: 5, n_inputs: 256}}
{killer}
checkpoint: {{every_n_steps: 3}}
progress_bar: {{refresh_rate: 0}}
model:
  class_path: lightning_sae.ReLUSAE
  init_args: {{d_sae: 256, l1_coefficient: 60.0, lr: 0.003, lr_warmup_steps: 4, lr_decay_steps: 4}}
data:
  class_path: lightning_sae.ActivationDataModule
  init_args:
    hook_name: blocks.1.hook_resid_post
    context_length: 32
    blocks_per_pass: 4
    batch_size: 96
    buffer_size: 480
    center: true
    scale: true
    n_validation: 256
    max_norm_multiple: 5.0
"""


def write_config(root: Path, killer: str = "") -> str:
    path = root.with_suffix(".yaml")
    path.write_text(CONFIG.format(root=root, killer=killer))
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of the run that nothing stopped."""
    root = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-sae"])
        main(["fit", "--config", write_config(root)])
    return load_file(root / "sae" / "sae.safetensors")


KILLED = [(4, "SIGKILL"), (11, "SIGKILL"), (7, "SIGTERM"), (8, "SIGINT")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """Folder and exit status of a run for each step in which it gets its signal."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "killer.py").write_text(KILLER)
    configs = {}
    for at, signal_name in KILLED:
        arguments = f"{{step: {at}, signal_name: {signal_name}}}"
        killer = f"    - class_path: killer.KillAt\n      init_args: {arguments}"
        configs[at] = write_config(folder / f"run-{at}", killer)
    repository = Path(__file__).resolve().parent.parent
    environment = {"PYTHONPATH": f"{repository}:{folder}", "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # as here, for the same sums
    ran = subprocess.run(
        [sys.executable, "-c", EACH_IN_A_PROCESS, *configs.values()],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=True,
    )
    statuses = dict(zip(configs, json.loads(ran.stdout.splitlines()[-1]), strict=True))
    return {at: (folder / f"run-{at}", status) for at, status in statuses.items()}


@pytest.mark.parametrize(("at", "signal_name"), KILLED)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    at: int,
    signal_name: str,
    uninterrupted: dict[str, Tensor],
    killed: dict[int, tuple[Path, int]],
) -> None:
    root, status = killed[at]
    assert status == (-signal.SIGKILL if signal_name == "SIGKILL" else 1)
    last = root / "checkpoints" / "last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"]
    assert steps == (at // 3 * 3 if signal_name == "SIGKILL" else at + 1)
    main(["fit", "--config", write_config(root), "--ckpt_path", str(last)])
    resumed = load_file(root / "sae" / "sae.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_the_run_compared_with_did_resample_and_train(
    uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    """The comparison says something: another seed gives other weights everywhere."""
    root = tmp_path / "run"
    other: Any = main(["fit", "--config", write_config(root), "--seed_everything", "1"])
    weights = load_file(root / "sae" / "sae.safetensors")
    assert not any(torch.equal(weights[name], uninterrupted[name]) for name in weights)
    resampling = next(
        c for c in other.trainer.callbacks if type(c).__name__ == "DeadFeatureResampling"
    )
    assert resampling.state_dict()
