"""The half of an SAE that is written and read: portable folders and checkpoints."""

from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures.checks import compare_sources, require_matching
from lightning_sae.functional.penalties import plain_arguments
from lightning_sae.functional.sparse.code import Layout

S = TypeVar("S", bound="Saved")


class Saved(LightningModule):
    """A module that acts on raw activations wherever it is loaded; see `SparseAutoencoder`."""

    layout: Layout
    source: dict[str, Any]
    is_trained: bool

    def shift_pre_activations(self, state: dict[str, Tensor], by: Float[Tensor, " d_sae"]) -> None:
        """Change biases in a folded state so that all pre-activations change by so much."""
        state["b_enc"] = state["b_enc"] + by

    def adopt_scaling(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        """See inputs as `(x - mean) * scale`, and stay the same function of raw activations.

        So an SAE that was loaded is trained on in the space in which others are trained. Where
        `activate` is one that a scale would change, the SAE is left as it is.
        """
        from lightning_sae.saving import adopt_scaling  # it knows all architectures

        adopt_scaling(self, mean, scale)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the SAE to a new folder as safetensors and JSON, acting on raw activations.

        Centring and scaling are folded into the weights.

        Raises:
            ValueError: If `folder` exists and is not empty.
        """
        from lightning_sae.saving import save_pretrained  # it knows all architectures

        return save_pretrained(self, Path(folder))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls: type[S], folder: str | Path) -> S:
        """Read what `save_pretrained` wrote; for subclasses that `lightning_sae.load` cannot know.

        Raises:
            ValueError: If `folder` holds no SAE or one of another architecture.
        """
        from lightning_sae.saving import load

        return load(folder, cls)  # type: ignore[type-var]  # an SAE is what this is a half of

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what kind of SAE the checkpoint holds, of what, and the layout of its codes."""
        checkpoint["lightning_sae"] = {
            "architecture": type(self).__name__,
            "source": self.source,
            "dense": self.layout.dense,
            "ranks": 1 if self._trainer is None else self.trainer.world_size,
        }
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain_arguments(checkpoint["hyper_parameters"])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or shape before it is loaded.

        When training goes on, each rank adds what it alone had.

        Raises:
            ValueError: If it does not fit this SAE.
        """
        require_matching(self, checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._take_part(checkpoint)
        source = checkpoint["lightning_sae"]["source"]
        if self.source:
            compare_sources(source, self.source)
        self.source = self.source or source
        self.is_trained = True
        # The layouts differ by rounding: a run goes on with the one it had.
        self.layout.dense = checkpoint["lightning_sae"]["dense"]

    def _take_part(self, checkpoint: dict[str, Any]) -> None:
        from lightning_sae.rank_parts import take_part  # it saves, and saving knows this class

        saved, present = checkpoint["lightning_sae"].get("ranks", 1), self.trainer.world_size
        if saved != present:
            rank_zero_warn(
                f"The checkpoint is of a run of {saved} ranks and goes on with {present}. Weights, "
                "moments, schedules and counts are those of the checkpoint, but batches have "
                f"{present}/{saved} of their size and other text: the run is not the one that "
                "would have been."
            )
        elif self.trainer.global_rank > 0:
            take_part(Path(self.trainer.ckpt_path), self.trainer.global_rank, checkpoint)  # type: ignore[arg-type]
