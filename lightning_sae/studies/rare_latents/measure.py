"""Figures of rare latents: their number, their direction, and what could predict it."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sae.analysis.rare_latents import mean_direction, median, rare_directions
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.data import ActivationDataModule
from lightning_sae.functional.geometry import unit_rows
from lightning_sae.studies.rare_latents.hyperplanes import hyperplanes, normal_of
from lightning_sae.studies.rare_latents.settings import RARE
from lightning_sae.studies.shared.rows import Row
from lightning_sae.studies.shared.snapshots import Snapshots

ROWS = 4096  # activations encoded at a time


@torch.no_grad()
def sample(data: ActivationDataModule, n: int) -> Float[Tensor, "n d_in"]:
    """Raw activations of training text, in its order.

    Args:
        data: The stream of one hook.
        n: Their number, rounded up to whole blocks.
    """
    blocks, found, count = data.training_blocks(), [], 0
    while count < n:
        tokens = blocks.read(data.blocks_per_pass)
        activations = data.language_model.activations(tokens)
        kept = data.filter.kept(tokens, activations).to(activations.device)
        found.append(activations[kept].float().cpu())
        count += len(found[-1])
    return torch.cat(found)


@torch.no_grad()
def frequencies(sae: SparseAutoencoder, x: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_sae"]:
    """Share of activations on which each latent fires."""
    counts = sum((sae.encode(rows) > 0).sum(0) for rows in x.split(ROWS))
    assert isinstance(counts, Tensor)
    return counts.double() / len(x)


@torch.no_grad()
def measure(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n d_in"],
    held_out: Float[Tensor, "m d_in"],
    initial: Float[Tensor, " d_in"],
) -> Row:
    """Figures of one SAE.

    Args:
        sae: The SAE, on the CPU.
        x: Raw activations of training text, for frequencies and directions.
        held_out: Raw activations of held-out text, for L0 and FVU.
        initial: Sum of the decoder rows before training.

    Returns:
        `l0` and `fvu`; `rare` and `never`, shares of latents that fire on less than 1e-4 of `x` and
        on none; the figures of `rare_directions` and `hyperplanes`; `direction`, the mean of the
        rare latents' encoder rows, as a list; and its cosines with

        - `with_others`: the mean of the other latents' encoder rows,
        - `with_initial`: `initial`,
        - `with_input`: minus the mean of the encoder's input,
        - `with_normal`: `normal_of` the encoder's input,
        - `with_data`, `with_data_normal`: the last two for the activations, from the data alone.

        What needs rare latents is absent without them.
    """
    frequency = frequencies(sae, x)
    rare = frequency < RARE
    f = torch.cat([sae.encode(rows) for rows in held_out.split(ROWS)])
    error = (held_out - sae.decode(f)).square().sum()
    row: Row = {
        "l0": float((f > 0).sum(-1).double().mean()),
        "fvu": float(error / (held_out - held_out.mean(0)).square().sum()),
        "rare": float(rare.double().mean()),
        "never": float((frequency == 0).double().mean()),
    }
    row |= rare_directions(sae, rare)
    if rare.any() and not rare.all():
        row |= _cosines(sae, rare, x, initial) | hyperplanes(sae, rare, x)
    return row


def _cosines(
    sae: SparseAutoencoder,
    rare: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "n d_in"],
    initial: Float[Tensor, " d_in"],
) -> Row:
    direction = mean_direction(sae.W_enc.T[rare])
    seen = sae.encoder_input(x)
    against = {
        "with_others": mean_direction(sae.W_enc.T[~rare]),
        "with_initial": initial,
        "with_input": -seen.mean(0),
        "with_normal": normal_of(seen),
        "with_data": -x.mean(0),
        "with_data_normal": normal_of(x),
    }
    cosines = {
        name: float(unit_rows(other[None]).squeeze(0) @ direction)
        for name, other in against.items()
    }
    return {**cosines, "direction": direction.tolist()}


def over_time(snapshots: Snapshots, from_share: float = 0.3) -> Row:
    """What becomes of the latents that are rare early in a run.

    Args:
        snapshots: Of an SAE's frequencies in training.
        from_share: Share of the run after which the rare latents are chosen; one that fires on less
            than `RARE` of the activations of the window that ends there is rare.

    Returns:
        `steps`, and for each window the share of rare latents `rare`, and of those chosen the
        share that did not fire, `silent`; `chosen`, their number; `still_rare`, the share of them
        that is rare in the last window; and `rarer`, of those that fired in the window in which
        they were chosen, the share that fires less in the last one.
    """
    each = snapshots.counts.double() / snapshots.n[:, None]
    start = max(0, round(from_share * len(each)) - 1)
    chosen = each[start] < RARE
    fired = chosen & (each[start] > 0)
    return {
        "steps": snapshots.steps.tolist(),
        "rare_over_time": (each < RARE).double().mean(1).tolist(),
        "silent": (each[:, chosen] == 0).double().mean(1).tolist() if chosen.any() else [],
        "chosen_at": int(snapshots.steps[start]),
        "chosen": int(chosen.sum()),
        "still_rare": _share(each[-1, chosen] < RARE),
        "rarer": _share(each[-1, fired] < each[start, fired]),
        "median_at_choice": median(each[start, chosen]) if chosen.any() else None,
        "median_at_end": median(each[-1, chosen]) if chosen.any() else None,
    }


def _share(which: Bool[Tensor, " n"]) -> float | None:
    return float(which.double().mean()) if len(which) else None


def stored(folder: Path, name: str) -> Path:
    """The file of an SAE's figures."""
    return folder / "figures" / f"{name}.json"
