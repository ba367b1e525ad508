"""Run token blocks through the language model and filter the activations."""

import math
import time
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_sae.data.devices import sent
from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.notices import say_passes, say_unknown
from lightning_sae.data.scaling import require_precision
from lightning_sae.data.tokens import TokenBlocks

REASONS = ("special_token", "position", "norm", "context_only")


class ActivationFilter:
    """Which activations of a batch of blocks an SAE is trained and evaluated on.

    Args:
        special_tokens: Tokens whose activations are left out.
        positions: First position kept and the one after the last; None keeps all.
        max_norm_multiple: Activations longer than this multiple of the batch's median norm are
            left out; None keeps all.
        widths: Widths of several hooks whose activations are concatenated. An activation is then
            left out if it is too long at any hook.
    """

    def __init__(
        self,
        special_tokens: list[int],
        positions: tuple[int, int] | None = None,
        max_norm_multiple: float | None = None,
        widths: list[int] | None = None,
    ) -> None:
        if max_norm_multiple is not None and max_norm_multiple <= 1:
            raise ValueError(
                "Expected argument `max_norm_multiple` to be more than 1, because it multiplies "
                f"the median norm, but got {max_norm_multiple}: 10 leaves out outliers."
            )
        self.special_tokens = torch.tensor(special_tokens, dtype=torch.long)
        self.positions = positions
        self.max_norm_multiple = max_norm_multiple
        self.widths = widths

    def left_out(
        self, tokens: Int[Tensor, "batch seq"], activations: Float[Tensor, "batch seq d_in"]
    ) -> dict[str, Bool[Tensor, "batch seq"]]:
        """Masks of the activations that each reason leaves out; reasons may overlap."""
        special = torch.isin(tokens, self.special_tokens)
        outside = torch.zeros_like(special)
        if self.positions is not None:
            first, end = self.positions
            outside[:, :first] = True
            outside[:, end:] = True
        context_only = tokens < 0  # see `encoding`
        far = torch.zeros_like(special)
        if self.max_norm_multiple is not None:
            for part in activations.split(self.widths or activations.shape[-1], -1):
                norms = part.float().norm(dim=-1).to(tokens.device)
                far |= self._far(norms, special | outside | context_only)
        return dict(zip(REASONS, (special, outside, far, context_only), strict=True))

    def _far(
        self, norms: Float[Tensor, "batch seq"], left_out: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch seq"]:
        """Mask of norms that are not finite, or above the multiple of the kept ones' median."""
        far = ~torch.isfinite(norms)
        rest = norms[~(left_out | far)]
        if len(rest):
            far |= norms > cast(float, self.max_norm_multiple) * rest.median()
        return far

    def kept(
        self, tokens: Int[Tensor, "batch seq"], activations: Float[Tensor, "batch seq d_in"]
    ) -> Bool[Tensor, "batch seq"]:
        """Mask of the activations that no reason leaves out."""
        return ~torch.stack(list(self.left_out(tokens, activations).values())).any(0)


def rows_where(
    kept: Bool[Tensor, "batch seq"], activations: Float[Tensor, "batch seq d_in"]
) -> Float[Tensor, "rows d_in"]:
    """The kept activations. Their number is known on the CPU, so a GPU is not waited for."""
    places = kept.flatten().nonzero().squeeze(1)
    return activations.flatten(0, 1).index_select(0, sent(places, activations.device))


class ActivationStream:
    """Endless activations at the model's hook, one forward pass at a time.

    Args:
        model: The language model.
        blocks: The blocks of text.
        keep: Which activations are kept.
        blocks_per_pass: Blocks in one forward pass.
        dtype: dtype of the rows.
        wanted: Rows that the run needs; None if unknown.
        unknown_token: Token for characters that the tokenizer does not know; None without one.

    Attributes:
        seconds: Seconds that the model has run, in this process.
        offset: Subtracted before rows are stored in a shorter dtype than the model's, the mean of
            the first pass. A coordinate with a large mean would lose its digits otherwise.
    """

    def __init__(
        self,
        model: LanguageModel,
        blocks: TokenBlocks,
        keep: ActivationFilter,
        blocks_per_pass: int,
        dtype: torch.dtype = torch.float32,
        *,
        wanted: float | None = None,
        unknown_token: int | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.keep = keep
        self.blocks_per_pass = blocks_per_pass
        self.dtype = dtype
        self.wanted, self.unknown_token = wanted, unknown_token
        self.seen = self.kept = self.unknown = 0
        self.dropped = dict.fromkeys(REASONS, 0)
        self.seconds = 0.0
        self.offset: Tensor | None = None
        self._offset: Tensor | None = None  # on the device of the batches
        self._said_passes = self._said_unknown = False

    def read(self) -> Float[Tensor, "rows d_in"]:
        """Kept activations of the next forward pass."""
        epoch = self.blocks.epoch
        tokens = self.blocks.read(self.blocks_per_pass)
        began = time.perf_counter()
        activations = self.model.activations(tokens)
        self.seconds += time.perf_counter() - began
        left_out = self.keep.left_out(tokens, activations)
        kept = ~torch.stack(list(left_out.values())).any(0)
        for reason, mask in left_out.items():
            self.dropped[reason] += int(mask.sum())
        rows = rows_where(kept, activations)
        if self.kept == 0 and len(rows) and self.dtype.itemsize < rows.dtype.itemsize:
            self.offset = rows[rows.isfinite().all(-1)].mean(0).nan_to_num().cpu()  # NaN of no row
            for part in self._stored(rows, rows.dtype).split(self._widths(rows), -1):
                require_precision(part, self.dtype)
        seen = self.seen
        self._count(tokens, len(rows))
        if self.blocks.epoch > epoch:
            self._count_passes(seen)
        return self._stored(rows, self.dtype)

    def _widths(self, rows: Tensor) -> list[int]:
        return self.keep.widths or [rows.shape[-1]]

    def _stored(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return (rows if self.offset is None else rows - self.offset.to(rows)).to(dtype)

    def restored(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Activations from rows that `read` gave."""
        if self.offset is None:
            return rows
        if self._offset is None or self._offset.device != rows.device:
            self._offset = self.offset.to(rows.device)
        return rows.float() + self._offset

    def sample(self, n: int) -> Float[Tensor, "n d_in"]:
        """Activations of the text that follows, not counted in `statistics`.

        About 128 activations of one block in every 4096 tokens, because activations of one document
        are similar, and documents differ.
        """
        length, found = self.blocks.context_length, list[Tensor]()
        apart, step = max(2, 4096 // length), max(1, length // 128)
        per_pass = min(self.blocks_per_pass, math.ceil(n * step / length))
        while sum(len(rows) for rows in found) < n:
            tokens = torch.cat([self.blocks.read(apart)[-1:] for _ in range(per_pass)])
            activations = self.model.activations(tokens)
            kept = self.keep.kept(tokens, activations)
            found.append(activations[kept.to(activations.device)][::step].float().cpu())
        return torch.cat(found)[:n]

    def _count(self, tokens: Int[Tensor, "batch seq"], n_rows: int) -> None:
        self.seen += tokens.numel()
        self.kept += n_rows
        if self.unknown_token is not None:
            self.unknown += int((tokens == self.unknown_token).sum())

    def _count_passes(self, seen: int) -> None:
        """At the end of a pass over the text, warn once if there will be many passes.

        Args:
            seen: Tokens seen before the read in which the pass ended.
        """
        if not self._said_passes:
            epoch, share = self.blocks.epoch, self.kept / self.seen
            per_pass = share * (seen + self.blocks.left_at_end) / epoch
            self._said_passes = bool(say_passes(per_pass, self.wanted, epoch))

    def say_unknown(self) -> None:
        """Warn once about tokens for characters that the tokenizer does not know, if any."""
        if self.unknown and not self._said_unknown:
            self._said_unknown = True
            say_unknown(self.unknown, self.seen, "training")

    def statistics(self) -> dict[str, float]:
        """Activations seen, completed passes over the text, rows skipped, shares left out."""
        shares = {f"dropped_{k}": n / max(self.seen, 1) for k, n in self.dropped.items()}
        counts = {"text_epoch": self.blocks.epoch, "skipped_rows": self.blocks.skipped}
        return {"seen": float(self.seen), **{k: float(n) for k, n in counts.items()}, **shares}

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream."""
        counts = {name: getattr(self, name) for name in ("seen", "kept", "unknown")}
        own = {"dropped": {**self.dropped}, "offset": self.offset}
        return {"blocks": self.blocks.state_dict(), **own, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        self.blocks.load_state_dict(state["blocks"])
        self.offset, self._offset = state.get("offset"), None
        self.seen, self.dropped = state["seen"], self.dropped | state["dropped"]
        self.kept, self.unknown = state.get("kept", self.seen), state.get("unknown", 0)
