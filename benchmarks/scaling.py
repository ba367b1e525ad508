"""Memory and communication of a large dictionary, on paper: `python -m benchmarks.scaling`.

Prints for a dictionary on several devices what each device holds, and what it sends in a step, if
the devices split the batch (`ddp`) and if they split the latents (`SplitDictionary`). What a step
hands over to each collective is counted in `tests/ranks/test_split.py`.
"""

import argparse
import math

from lightning_sae.functional.sparse.selection import FEW

FLOAT = 4
"""Bytes of a weight, a moment or a reconstruction's entry; steps sum in float32."""


def sent_a_step(
    d_in: int,
    batch: int,
    *,
    parts: int = 2,
    k: int = 0,
    over_batch: bool = False,
    n_reconstructions: int = 1,
    k_aux: int = 0,
    batch_bytes: int = FLOAT,
) -> dict[str, int]:
    """Bytes that a device hands over in a step of a split dictionary, without counts and norms.

    Args:
        d_in: Width of the activations.
        batch: Rows of the batch.
        parts: Devices that hold the dictionary.
        k: Latents selected per row; 0 for a threshold, as a ReLU has.
        over_batch: Whether they are selected over the batch.
        n_reconstructions: 1; 2 for a gated SAE, one for each prefix of a Matryoshka SAE.
        k_aux: Dead latents selected per row, while there are any; 0 without the loss `auxk`.
        batch_bytes: Bytes of an activation.

    Returns:
        `batch`, which the first part broadcasts; `reconstruction` and `b_dec`, which are summed;
        `candidates`, which are gathered.
    """
    selected = _shown(batch * k, parts) if over_batch else batch * _shown(k, parts)
    revived = batch * _shown(k_aux, parts)
    return {
        "batch": batch * d_in * batch_bytes,
        "reconstruction": (n_reconstructions + (k_aux > 0)) * batch * d_in * FLOAT,
        "b_dec": d_in * FLOAT,
        "candidates": (selected + revived) * FLOAT,
    }


def _shown(k: int, parts: int) -> int:
    """Candidates that a device shows the others, for a share of the selected like theirs."""
    return k if k <= FEW else min(k, 2 * math.ceil(k / parts))


def sent_with_copies(d_in: int, d_sae: int) -> int:
    """Bytes of gradients that a device hands over in a step of `ddp`."""
    return (2 * d_in * d_sae + d_sae + d_in) * FLOAT


def on_the_wire(sent: dict[str, int], parts: int) -> float:
    """Bytes that leave a device with algorithms of a ring, the fewest that are possible."""
    summed, gathered = sent["reconstruction"] + sent["b_dec"], sent["candidates"]
    around = (parts - 1) / parts
    return sent["batch"] * around + 2 * around * summed + (parts - 1) * gathered


def held(d_in: int, d_sae: int, parts: int) -> dict[str, float]:
    """Bytes that a device holds between steps, and at the end of a step besides."""
    own = d_sae // parts
    weights = float((2 * d_in * own + own + d_in) * FLOAT)
    return {"weights": weights, "moments": 2 * weights, "gradients": weights}


def main() -> None:
    """Print the sums."""
    asked = parser().parse_args()
    d, f, batch, devices = asked.d_in, asked.d_sae, asked.batch, asked.devices
    print(f"F {f:,}, d {d:,}, {batch:,} activations a step, {devices} devices")  # noqa: T201
    for parts in sorted({1, devices}):
        sizes = held(d, f, parts)
        text = ", ".join(f"{name} {_gb(size)}" for name, size in sizes.items())
        print(f"  {parts} part(s): each device holds {text}: {_gb(sum(sizes.values()))}")  # noqa: T201
    copies = sent_with_copies(d, f)
    around = 2 * (devices - 1) / devices * copies
    _line("ddp", copies, around, asked.rate)
    terms = {
        "split, ReLU": {},
        f"split, TopK {asked.k}": {"k": asked.k},
        f"split, TopK {asked.k}, with dead latents": {"k": asked.k, "k_aux": d // 2},
        f"split, BatchTopK {asked.k}": {"k": asked.k, "over_batch": True},
        "split, gated": {"n_reconstructions": 2},
    }
    for name, own in terms.items():
        sent = sent_a_step(d, batch, parts=devices, batch_bytes=asked.batch_bytes, **own)
        _line(name, sum(sent.values()), on_the_wire(sent, devices), asked.rate)


def _line(name: str, sent: float, wire: float, rate: float) -> None:
    took = f"{1000 * wire / (rate * 1e9):,.1f} ms at {rate:g} GB/s"
    print(f"  {name}: hands over {_gb(sent)}, sends {_gb(wire)} a step, {took}")  # noqa: T201


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m benchmarks.scaling`."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    found.add_argument("--d_in", type=int, default=4096)
    found.add_argument("--d_sae", type=int, default=2**20)
    found.add_argument("--batch", type=int, default=4096, help="activations in a step")
    found.add_argument("--batch_bytes", type=int, default=FLOAT, help="of an activation")
    found.add_argument("--devices", type=int, default=8)
    found.add_argument("--k", type=int, default=64)
    found.add_argument("--rate", type=float, default=300.0, help="GB/s that leave a device")
    return found


if __name__ == "__main__":
    main()
