"""Saving and loading an SAE: portable folders, the Hugging Face hub, checkpoints."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sae.architectures import hub, portable
from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.distributed.ranks import take_part, trainer_of
from lightning_sae.distributed.split import copies_of, whole_shapes
from lightning_sae.files import first_line
from lightning_sae.functional.penalties import plain_arguments
from lightning_sae.functional.sparse.code import Layout
from lightning_sae.training.compatibility import compare_sources, require_matching
from lightning_sae.training.finite import require_finite_weights
from lightning_sae.training.resuming import Settings, compare_settings, note_settings, settings_of

S = TypeVar("S", bound="Saved")


class Saved(portable.Portable, ModelHubMixin):
    """Base class with the methods of an SAE that save and load it.

    Attributes:
        source: Where the activations of its training come from.
        is_trained: Whether it has been trained, so that `b_dec` is no longer to be placed.
        n_trained: Activations seen in training, by all ranks.
    """

    b_dec: Float[Tensor, " d_in"]
    layout: Layout
    parts: Parts = ALONE
    source: dict[str, Any]
    is_trained: bool
    n_trained: int

    def adopt_scaling(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        """Centre and scale inputs as `(x - mean) * scale`, without changing what the SAE computes.

        A loaded SAE is then trained further in the same space as a new one. If `activate` does not
        scale with its input, nothing is changed.
        """
        portable.adopt_scaling(self, mean, scale)

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002  `push_to_hub` gives a configuration, and the SAE has its own
    ) -> Path:
        """Write the SAE to a new folder as safetensors and JSON.

        Centring and scaling are folded into the weights, which then act on raw activations. With a
        split dictionary all processes have to call this, and one writes the whole.

        Args:
            folder: The folder.
            model_card_kwargs: Arguments of `generate_model_card`; without them no card is written.
            kwargs: Nothing of use.

        Raises:
            ValueError: If `folder` exists and is not empty.
        """
        written = portable.save_pretrained(self, Path(folder))
        if model_card_kwargs is not None and (written / portable.CONFIG).exists():
            self.generate_model_card(**model_card_kwargs).save(written / "README.md")
        return written

    def push_to_hub(
        self, repo_id: str, *, figures: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> str:
        """Upload the SAE and its model card to a repository on the Hugging Face hub.

        `lightning_sae.load(repo_id)` reads it, and `lightning-sae push` does the same with a run.

        Args:
            repo_id: `owner/name`; the repository is made if there is none.
            figures: Figures on held-out text, for the card.
            kwargs: As `huggingface_hub.ModelHubMixin.push_to_hub` takes them: `private`, `token`,
                `branch`, `create_pr`, `commit_message` and so on.

        Returns:
            The address of the commit.
        """
        card = {"name": repo_id, "figures": figures}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(
        self, name: str = "Sparse autoencoder", figures: Mapping[str, Any] | None = None
    ) -> ModelCard:
        """The card of this SAE: how to load it, settings, source, tokens, versions, figures."""
        return hub.card_of(portable.described(self), name, figures)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[S], folder: str | Path, *, revision: str | None = None
    ) -> S:
        """Load an SAE that `save_pretrained` wrote. Unlike `lightning_sae.load`, also any subclass.

        Args:
            folder: The folder, or the name `owner/name[/folder]` of one on the hub.
            revision: Branch, tag or commit of a repository on the hub.

        Raises:
            ValueError: If `folder` holds no SAE or one of another architecture.
        """
        return portable.read(hub.on_disk(folder, revision), cls)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture, the data's source and the settings of the run to the checkpoint.

        Raises:
            FloatingPointError: If weights are not finite, because the run could not be resumed.
        """
        trainer = trainer_of(self)
        checkpoint["lightning_sae"] = {
            "architecture": type(self).__name__,
            "source": self.source,
            "dense": self._of_parts(self.layout.dense),
            "density": self._of_parts(self.layout.last_share),
            "n_trained": self.n_trained,
            "is_trained": self.is_trained,  # False if a tuner saves before its trial steps
            "ranks": 1 if trainer is None else copies_of(trainer).n,
        }
        if trainer is not None:
            note_settings(checkpoint, self._settings())
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain_arguments(checkpoint["hyper_parameters"])
        on_any = partial(self.parts.any, device=self.device)
        require_finite_weights(self, 0 if trainer is None else trainer.global_step, on_any)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint before it is loaded; on resume, add what only this rank had saved.

        Raises:
            ValueError: If it has another architecture or shape, or settings that cannot change.
        """
        require_matching(self, checkpoint, whole_shapes(self, self.parts))
        trainer = trainer_of(self)
        if trainer is not None:
            compare_settings(checkpoint, self._settings(), trainer)
        if trainer is not None and trainer.state.fn == "fit":
            self._take_part(checkpoint)
        source = checkpoint["lightning_sae"]["source"]
        if self.source:
            compare_sources(source, self.source)
        self.source = self.source or source
        self.is_trained = checkpoint["lightning_sae"].get("is_trained", True)
        self.n_trained = checkpoint["lightning_sae"].get("n_trained", 0)
        # Layouts differ by rounding, so an exact resume needs the same one.
        self.layout.dense = bool(self._own(checkpoint["lightning_sae"]["dense"]))
        self.layout.last_share = self._own(checkpoint["lightning_sae"].get("density", -1.0))

    def _of_parts(self, value: float) -> float | list[float]:
        """The value on this device; with a split dictionary, a list of the values of all parts."""
        if self.parts.n == 1:
            return value
        return self.parts.gathered(torch.tensor(value, device=self.device)).tolist()

    def _own(self, saved: float | list[float]) -> float:
        if not isinstance(saved, list):
            return saved
        return saved[self.parts.index if len(saved) == self.parts.n else 0]

    def _settings(self) -> Settings:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return settings_of(self.trainer, {"model.": self}, {"": callbacks})

    def _take_part(self, checkpoint: dict[str, Any]) -> None:
        index, present, _ = copies_of(self.trainer)
        saved = checkpoint["lightning_sae"].get("ranks", 1)
        if saved != present:
            rank_zero_warn(
                f"The checkpoint is of a run of {saved} ranks and goes on with {present}. Weights, "
                "moments, schedules and counts are those of the checkpoint, but batches have "
                f"{present}/{saved} of their size and other text: the resume is not exact."
            )
        elif index > 0:
            take_part(Path(self.trainer.ckpt_path), index, checkpoint)  # type: ignore[arg-type]

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights. A `b_dec` other than zero, as after `ddp_spawn`, marks it as trained."""
        found = super().load_state_dict(*args, **kwargs)
        self.is_trained |= bool(self.b_dec.any())
        return found

    @classmethod
    @override
    def load_from_checkpoint(
        cls: type[S],
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> S:
        """As Lightning's, but unpickles nothing, and restores penalties as objects.

        `lightning_sae.load` does the same for any architecture of the package.

        Raises:
            ValueError: If the penalty is not from this package: then give it as `penalty`; or if
                the file is damaged, or does not fit the class.
        """
        if weights_only is not False:
            portable.require_sound(checkpoint_path, kwargs)
        try:
            if "penalty" not in kwargs:
                kwargs |= portable.penalty_of(checkpoint_path)
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
        except (TypeError, KeyError, AttributeError) as error:
            reason = f"its `hyper_parameters` give no {cls.__name__}: {first_line(error)}"
            raise ValueError(f"Could not read {checkpoint_path}: {reason}.") from error
