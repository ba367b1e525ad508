"""What every sparse autoencoder shares: weights, scaling, and a training step."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sae.architectures.decoder_norm import (
    DecoderNormProjection,
    keep_unit_rows,
    require_init_norm,
)
from lightning_sae.architectures.held_out import Evaluated
from lightning_sae.architectures.initial import create_directions
from lightning_sae.architectures.objective import Outcome, Step, at_once, in_chunks
from lightning_sae.architectures.saving import Saved
from lightning_sae.architectures.silence import Silence
from lightning_sae.architectures.target_l0 import TargetL0
from lightning_sae.checkpoints import AtomicCheckpointIO
from lightning_sae.checks import require_integers, require_one_of, require_positive
from lightning_sae.data.source import source_of
from lightning_sae.distributed.parts import ALONE, Parts
from lightning_sae.distributed.ranks import Devices, Ranks, require_agreement, trainer_of
from lightning_sae.distributed.split import (
    copies_of,
    keep_own_part,
    norm_over_parts,
    parts_of,
    require_whole,
)
from lightning_sae.distributed.undrawn import without_drawing
from lightning_sae.files import first_line
from lightning_sae.functional.penalties import plain_arguments
from lightning_sae.functional.revival import auxk, ghost_gradients, variance
from lightning_sae.functional.sparse.code import Code, Layout, default_chunk_rows, encode
from lightning_sae.functional.sparse.memory import keep_freed_blocks
from lightning_sae.functional.sparse.selection import Rule
from lightning_sae.functional.waiting import Behind
from lightning_sae.metrics import held_out_metrics
from lightning_sae.tensors import require_batch, require_latents, require_on, require_width
from lightning_sae.training.compatibility import warn_of_other_activations
from lightning_sae.training.finite import LossCheck, require_finite_weights, require_trainable_norm
from lightning_sae.training.lengths import Length, refuse_lengths
from lightning_sae.training.logging import QuickLogging
from lightning_sae.training.optimizer import (
    NAMES,
    Decay,
    adam_with_schedule,
    clip_gradients,
    peak_rate,
    require_rates,
    schedule_problems,
    set_peak_rates,
)
from lightning_sae.training.supported import (
    require_a_batch,
    require_supported_callbacks,
    require_supported_features,
    require_usable_optimizers,
)

SAE = TypeVar("SAE", bound="SparseAutoencoder")


class SparseAutoencoder(Saved, Evaluated, QuickLogging, ABC):
    """Base class of all architectures. A subclass defines the activation and the loss.

    Training may use centred and scaled inputs, `(x - input_mean) * input_scale`; `encode`, `decode`
    and `forward` always take and return raw activations.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents; 8 times `d_in` by default.
        lr: Peak learning rate of Adam; by default 0.004 for 1024 latents and less for more, see
            `lightning_sae.training.optimizer.peak_rate`.
        betas: Adam's decay rates of the first and second moment.
        lr_warmup_steps: Optimizer steps over which the learning rate rises linearly from zero, or
            a share of `trainer.max_steps` between 0 and 1.
        lr_decay_steps: Optimizer steps at the end of the run over which it falls linearly to zero,
            or a share of the run. `auto` is a quarter of a run whose `trainer.max_steps` is known.
            By default `auto` with the default `lr` (tied SAEs: 0), and 0 with one that is given.
        clip_grad_norm: Norm to which the gradient is clipped; null for no clipping.
        apply_b_dec_to_input: Whether `b_dec` is subtracted from the encoder's input.
        b_dec_init: Initial `b_dec`: `mean` of the first batch, or `zero`.
        decoder_norm: `unit` keeps decoder rows at norm 1 (with the callback
            `DecoderNormProjection`); `free` weights the penalty by their norms instead.
        decoder_init_norm: Initial norm of decoder rows, and of the encoder's columns, which start
            equal to them. Other than 1 only with `decoder_norm="free"`; SAELens has 0.1.
        dead_after: A latent is dead if it did not fire on this many activations in a row.
        revive: Loss that gives dead latents a gradient: `auxk`, `ghost` or `none`; see
            `lightning_sae.functional.revival`. The callback `DeadFeatureResampling` is another way.
        revive_coefficient: Weight of that loss, in the units of the squared error.
        k_aux: Number of dead latents per row that `auxk` uses; half of `d_in` by default.
        chunk_rows: Rows of a batch whose dense pre-activations are computed at a time; fewer rows
            need less memory. Chosen by size by default, see `default_chunk_rows` in
            `lightning_sae.functional.sparse.code`.

    A subclass implements `activate` and `objective`, and `latents` for a sparse training step. What
    it may rely on is listed in `docs/extending.md`.

    Attributes:
        layout: Whether the latents of the next batch are a dense matrix or a sparse code.
        metrics: The held-out metrics, of raw activations.
        held_out_frequency: Firing frequency of each latent at the last evaluation.
        held_out_count: Number of activations in the current evaluation, over all ranks.
        parts: The devices that hold the dictionary together, with the strategy `SplitDictionary`.
            Weights and counts are then those of this device's latents.

    Raises:
        ValueError: If a size, a rate or a length is out of range.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    input_mean: Float[Tensor, " d_in"]
    input_scale: Float[Tensor, ""]
    silent_for: Int[Tensor, " d_sae"]

    parts: Parts = ALONE
    _axes: dict[str, int] | None = None  # of a part

    # Whether the latents and losses of a row do not depend on other rows of the batch, so that a
    # batch may be evaluated in chunks. A class that defines `activate`, `latents` or `objective`
    # does not inherit this.
    rows_are_independent = False
    latents_follow_activate = True  # whether training uses the `activate` of a subclass
    # Whether these three exchange what they need of other latents through `parts`, so that the
    # dictionary may be split over devices. Not inherited either.
    may_be_split = False
    # Whether latents are dealt to the parts in turn, because the first are active more often.
    deals_latents = False
    tied = False  # whether `W_enc` is a view of `W_dec`
    share_of_peak_rate = 1.0  # the default `lr` of this class as a share of `peak_rate`
    default_decay: Decay = "auto"  # `lr_decay_steps` of this class with that rate
    length_names = NAMES  # of arguments that are lengths, see `lightning_sae.training.lengths`
    coefficient_name: str | None = None  # of the penalty's weight, if there is a penalty
    steered_l0: float | None = None  # the L0 to which `TargetL0` steers this weight
    latent_units: tuple[str, ...] = ("b_enc",)  # weights in the units of the latents
    input_units: tuple[str, ...] = ("b_dec",)  # points in the space of the activations
    # Thresholds and running means, where small changes matter: they stay in float32 or more when
    # the SAE is converted to a lower precision.
    kept_in_float32: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class whose training would not use its `activate`.

        Raises:
            TypeError: If a class defines `activate` but inherits a training step that ignores it.
        """
        super().__init_subclass__(**kwargs)
        own: dict[str, Any] = {}
        for base in cls.__mro__:  # the class and its mixins, up to the first SAE
            if base is not cls and issubclass(base, SparseAutoencoder):
                break
            own = {**vars(base), **own}
        if own.keys() & {"activate", "latents", "objective"}:
            cls.rows_are_independent = own.get("rows_are_independent", False)
            cls.may_be_split = own.get("may_be_split", False)
        if "latents" in own:
            cls.latents_follow_activate = own.get("latents_follow_activate", False)
        says_how_to_train = own.keys() & {"latents", "objective", "latents_follow_activate"}
        if "activate" in own and not says_how_to_train and not cls.latents_follow_activate:
            raise TypeError(
                f"`{cls.__name__}` defines `activate`, which `encode` uses, but inherits a "
                "training step that does not use it: define `latents` and `objective` too, or "
                "derive it from `SparseAutoencoder`, `ReLUSAE`, `TiedSAE` or `TopKSAE`, which "
                "train with `activate`."
            )

    def __init__(
        self,
        d_in: int,
        d_sae: int | None = None,
        *,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        lr_warmup_steps: Length = 0,
        lr_decay_steps: Decay | None = None,
        clip_grad_norm: float | None = 1.0,
        apply_b_dec_to_input: bool = True,
        b_dec_init: Literal["mean", "zero"] = "mean",
        decoder_norm: Literal["unit", "free"] = "unit",
        decoder_init_norm: float = 1.0,
        dead_after: int = 1_000_000,
        revive: Literal["none", "auxk", "ghost"] = "none",
        revive_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        d_sae = 8 * d_in if d_sae is None else d_sae
        require_integers(d_in=d_in, d_sae=d_sae)
        require_positive(d_in=d_in, d_sae=d_sae, dead_after=dead_after)
        if lr_decay_steps is None:
            lr_decay_steps = self.default_decay if lr is None else 0
        lr = self.share_of_peak_rate * peak_rate(d_sae) if lr is None else lr
        require_rates(lr, betas, lr_warmup_steps, lr_decay_steps)
        given = {"clip_grad_norm": clip_grad_norm, "chunk_rows": chunk_rows, "k_aux": k_aux}
        require_positive(**{name: value for name, value in given.items() if value is not None})
        require_one_of(("mean", "zero"), b_dec_init=b_dec_init)
        require_init_norm(decoder_init_norm, decoder_norm)
        require_one_of(("none", "auxk", "ghost"), revive=revive)
        self.d_in, self.d_sae = d_in, d_sae
        self.lr, self.betas = lr, betas
        self.lr_warmup_steps, self.lr_decay_steps = lr_warmup_steps, lr_decay_steps
        self.save_hyperparameters()
        self.clip_grad_norm = clip_grad_norm
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.b_dec_init = b_dec_init
        self.decoder_norm, self.decoder_init_norm = decoder_norm, decoder_init_norm
        self.dead_after = dead_after
        self.revive, self.revive_coefficient = revive, revive_coefficient
        self.k_aux = k_aux or max(1, d_in // 2)
        self.chunk_rows = chunk_rows
        self.layout = Layout()
        self.source: dict[str, Any] = {}
        self.is_trained = False
        self.n_trained = 0  # activations seen in training, by all ranks
        self.penalty_scale = 1.0  # of the coefficient; changed by `L1Warmup`
        self.penalty_factor = 1.0  # of the coefficient; changed by `TargetL0`
        self._silence = Silence()
        self._loss_check = LossCheck()
        self._behind = Behind()
        self._lengths_are_unknown = False
        self._create_weights()
        self.metrics = held_out_metrics(d_in, d_sae)

    @override
    def save_hyperparameters(
        self, *args: Any, frame: FrameType | None = None, **kwargs: Any
    ) -> None:
        """As Lightning's, but saves the actual `d_sae`, `lr` and decay where none were given."""
        frame = frame or cast(FrameType, inspect.currentframe()).f_back
        super().save_hyperparameters(*args, frame=frame, **kwargs)
        own = cast(Any, self)  # Lightning's own types leave these out
        for noted in (own._hparams, own._hparams_initial):
            if "d_sae" in noted:
                noted["d_sae"] = self.d_sae
            for name in ("lr", "lr_decay_steps"):
                if noted.get(name, 0) is None:
                    noted[name] = getattr(self, name)

    def _create_dictionary(self) -> None:
        """Decoder: random rows of one norm; encoder: its transpose; encoder bias: zero.

        The encoder is stored with one latent after another, as are its sparse gradients.
        """
        axes, norm = {"W_enc": 1, "W_dec": 0}, self.decoder_init_norm
        create_directions(self, self.d_sae, self.d_in, axes, norm)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def _create_weights(self) -> None:
        self._create_dictionary()
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.register_buffer("input_mean", torch.zeros(self.d_in))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("silent_for", torch.zeros(self.d_sae, dtype=torch.int64))

    # Methods that a subclass implements.

    @abstractmethod
    def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Latent activations from the encoder's pre-activations."""

    @abstractmethod
    def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Terms of the loss on centred and scaled activations."""

    def latents(self, x: Float[Tensor, "batch d_in"]) -> Code:
        """Latents for `objective`. The base class computes all of them, as a dense code."""
        return Code.of_matrix(self.activate(self.pre_activations(x)))

    # Methods for users: raw activations in and out, latents in their units.

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Latents of raw activations, in the units of the activations.

        Raises:
            ValueError: If the last axis of `x` is not `d_in`, its dtype is not floating-point, or
                it is on another device than the weights.
        """
        require_width(x, self.d_in)
        require_on(self.W_dec.device, x, "activations")
        return self.parts.joined(self.own_latents(x))

    def own_latents(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_own"]:
        """Latents of raw activations; of a split dictionary, only the latents on this device."""
        return self.activate(self.pre_activations(self.scaled(x))) / self.input_scale

    def decode(self, f: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """Raw activations reconstructed from latents.

        Raises:
            ValueError: If the last axis of `f` is not `d_sae`, or it is on another device.
        """
        require_latents(f, self.d_sae)
        require_on(self.W_dec.device, f, "latents")
        return self._decode_own(self.parts.own(f))

    def _decode_own(self, f: Float[Tensor, "... d_own"]) -> Float[Tensor, "... d_in"]:
        return self.unscaled(self.reconstruct(f * self.input_scale))

    @override
    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """Reconstruct raw activations."""
        if self.parts.n > 1:  # latents stay where they are
            require_width(x, self.d_in)
            return self._decode_own(self.own_latents(x))
        return self.decode(self.encode(x))

    # The same on centred and scaled activations.

    def scaled(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """Centre and scale raw activations, for `objective`."""
        return ((x - self.input_mean) * self.input_scale).to(self.W_dec.dtype)

    def unscaled(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """Undo `scaled`."""
        return x / self.input_scale + self.input_mean

    def code(self, x: Float[Tensor, "batch d_in"], rule: Rule) -> Code:
        """Pre-activations selected by a rule: the only dense product of a training step."""
        origin = self.encoder_origin()
        return encode(x, self.W_enc, self.b_enc, rule, self.layout, self.chunk_rows, origin)

    @property
    def ranks(self) -> Ranks:
        """The copies of this SAE on all ranks, during training."""
        return Ranks(self)

    @property
    def devices(self) -> Devices:
        """All devices of the run, each with some latents of some rows of a batch."""
        return Devices(self.ranks, self.parts)

    def latent_axes(self) -> dict[str, int]:
        """The axis of the latents, by name, of each parameter and buffer that has one."""
        if self._axes is not None:
            return self._axes
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        matrices = {"W_enc": 1, "W_dec": 0}
        of_inputs = {*self.input_units, "input_mean"}
        vectors = [n for n, t in tensors.items() if t.shape == (self.d_sae,) and n not in of_inputs]
        return {name: axis for name, axis in matrices.items() if name in tensors} | dict.fromkeys(
            vectors, 0
        )

    def weight_of_penalty(self) -> float:
        """The penalty's current coefficient, after warm-up and `TargetL0`."""
        assert self.coefficient_name is not None
        coefficient = getattr(self, self.coefficient_name)
        return coefficient * self.penalty_scale * self.penalty_factor

    def penalty_norms(self) -> Float[Tensor, " d_sae"] | None:
        """Norms of decoder rows that weight the penalty; None for norms of 1."""
        return None if self.decoder_norm == "unit" else self.W_dec.norm(dim=-1)

    def revival(
        self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of the argument `revive`; empty for `none`."""
        if self.revive == "none":
            return {}
        dead = self.dead_latents()
        if not self._any_part(len(dead) > 0)[0]:
            return {self.revive: x.new_zeros(())}
        seen, residual = self.encoder_input(x).detach(), (x - x_hat).detach()
        pre = seen @ self.W_enc.T[dead].T + self.b_enc[dead]
        if self.revive == "auxk":
            share = auxk(residual, pre, self.W_dec[dead], self.k_aux, self.ranks.mean, self.parts)
            # In the source, both this and the squared error are relative to the variance of x.
            loss = variance(x.detach(), self.ranks.mean) * share
        else:
            loss = ghost_gradients(residual, pre, self.W_dec[dead], self.ranks.mean, self.parts)
        return {self.revive: self.revive_coefficient * loss}

    def fresh_latent(self) -> dict[str, float]:
        """Initial values of a resampled latent by name of the vector, besides directions."""
        return {"b_enc": 0.0}

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Pre-activations of all latents."""
        return self.encoder_input(x) @ self.W_enc + self.b_enc

    def encoder_origin(self) -> Float[Tensor, " d_in"] | None:
        """The point that is subtracted from the encoder's input: `b_dec`, or None."""
        return self.parts.shared(self.b_dec) if self.apply_b_dec_to_input else None

    def encoder_input(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """The encoder's input: `x` minus the encoder's origin, if there is one."""
        origin = self.encoder_origin()
        return x if origin is None else x - origin

    def reconstruct(self, f: Code | Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """The decoder, applied to a code or a matrix of latents."""
        return self.decoded(f, self.W_dec) + self.b_dec

    def decoded(
        self, f: Code | Float[Tensor, "... d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "... d_in"]:
        """The weighted sum of all latents' decoder rows, on all devices."""
        product = f.decode(W_dec) if isinstance(f, Code) else f @ W_dec
        # In the precision of the weights, also under autocast: it is a long sum.
        return product if self.parts.n == 1 else self.parts.sum(product.to(W_dec.dtype))

    def _any_part(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on any part, so that all parts take the same branch."""
        return self.parts.any(*flags, device=self.device)

    # Training.

    @override
    def setup(self, stage: str) -> None:
        """Check the run, remember the data's `source`, and use atomic checkpoints.

        Raises:
            ValueError: If the data has another width, or the run uses something unsupported.
        """
        keep_freed_blocks()
        if stage == "fit":
            refuse_lengths(self.trainer, self)
        with without_drawing(self):
            require_supported_features(self, self.trainer, stage)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        data = source_of(self.trainer)
        if data is not None and data.d_in != self.d_in:
            raise ValueError(
                f"Expected argument `d_in` to be {data.d_in}, the width of the data's activations, "
                f"but got {self.d_in}: build the SAE with `d_in={data.d_in}` or choose another "
                "hook."
            )
        source = self.source if data is None else data.source
        if stage != "fit" and self.is_trained:
            warn_of_other_activations(self.source, source)
        self.source = source
        own = {"architecture": type(self).__name__, **plain_arguments(self.hparams)}
        run = {"max_steps": self.trainer.max_steps, "data": self.source}
        require_agreement(self.trainer, {**own, **run})
        parts = parts_of(self.trainer)
        if self.parts.n != parts.n:
            require_whole(self.parts)
            self._axes = keep_own_part(self, parts, self.trainer.strategy.root_device)
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has restored the weights
        if parts.n > 1:
            self.parts = parts

    @override
    def configure_callbacks(self) -> list[Callback]:
        """`DecoderNormProjection` for `decoder_norm="unit"`, unless a callback already does this.

        Without unit norms a penalty has no effect: latents shrink and decoder rows grow. And
        `TargetL0`, where the SAE has a target for it.

        Raises:
            ValueError: If the SAE has a target and the trainer a `TargetL0` with another.
        """
        trainer = trainer_of(self)
        given = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
        require_supported_callbacks(given)
        kept = any(getattr(callback, "constrains_decoder_norm", False) for callback in given)
        norms = [] if kept or self.decoder_norm == "free" else [DecoderNormProjection()]
        if self.steered_l0 is None:
            return [*norms]
        targets = {each.target for each in given if isinstance(each, TargetL0)}
        if targets - {self.steered_l0}:
            raise ValueError(
                f"Expected one target but the SAE has `target_l0`={self.steered_l0:g} and the "
                "trainer a `TargetL0` of its own: remove one of them."
            )
        # An earlier fit of this trainer has added it already.
        return [*norms] if targets else [*norms, TargetL0(self.steered_l0)]

    @override
    def on_train_start(self) -> None:
        """Use the `lr` found by `LearningRateFinder`, which sets it after the optimizer is made."""
        require_usable_optimizers(self.trainer)
        rates = [group.get("lr", self.lr) for group in self.parameter_groups()]
        for config in self.trainer.lr_scheduler_configs:
            set_peak_rates(config.scheduler, rates)

    @override
    def on_train_epoch_start(self) -> None:
        """Give all ranks the same number of batches, if their lengths are known."""
        self._lengths_are_unknown = self.ranks.shorten_epoch()

    @override
    def on_train_epoch_end(self) -> None:
        """Refuse data without a batch, with which Lightning would start epochs for ever."""
        # Of batches that are None, Lightning starts none.
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        require_a_batch(current.started)

    @override
    def on_fit_end(self) -> None:
        """Refuse data without a batch, for which Lightning runs no epoch."""
        if self.trainer.limit_train_batches != 0:
            require_a_batch(self.trainer.fit_loop.max_batches)

    @override
    def on_train_batch_start(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> None:
        """Before the first step, take over the data's scaling and initialise `b_dec`.

        The scaling does not change what a trained SAE computes.
        """
        if self._lengths_are_unknown:
            self.ranks.end_with_the_first()
        if not self.is_trained:
            require_batch(batch, self.d_in)
            self._start_from(batch)
        elif batch_idx == 0 and self.trainer.global_step == 0:
            scaling = self._scaling_of_data()
            if scaling is not None:
                self.adopt_scaling(*scaling)

    @torch.no_grad()
    def _start_from(self, batch: Float[Tensor, "batch d_in"]) -> None:
        require_width(batch, self.d_in)
        scaling = self._scaling_of_data()
        if scaling is not None:
            self.input_mean.copy_(scaling[0])
            self.input_scale.copy_(scaling[1])
        if not self.ranks.sum((batch != 0).sum()):
            warnings.warn(
                f"All {len(batch)} activations of the first batch are zero: if those that follow "
                "are too, nothing is learnt. Check the data and its hook.",
                stacklevel=2,
            )
        self._check_norm(batch)
        if self.b_dec_init == "mean":
            self.b_dec.copy_(self.ranks.mean(self.scaled(batch).mean(0)))
        self.is_trained = True

    def _check_norm(self, batch: Float[Tensor, "batch d_in"]) -> None:
        x = self.scaled(batch)
        norm = self.ranks.mean(x.double().square().sum(-1).mean()).sqrt().item()
        # A learning rate above the largest default is another mistake.
        step = min(self.lr, peak_rate(1)) * self.d_in**0.5
        require_trainable_norm(norm, x.dtype, step)

    def _scaling_of_data(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, ""]] | None:
        trainer = trainer_of(self)
        data = None if trainer is None else source_of(trainer)
        scaling = None if data is None else data.scaling()
        if scaling is None:
            return None
        return self.ranks.mean(scaling.mean), self.ranks.mean(scaling.scale)

    @override
    def training_step(self, batch: Float[Tensor, "batch d_in"], batch_idx: int) -> dict[str, Any]:
        """Loss of one batch. Callbacks get the returned dictionary as `outputs`.

        Returns:
            `loss`, a scalar; `fired` [d_sae], how often each latent fired in the batch;
            `squared_error` [batch], of each centred and scaled activation. With several ranks these
            are of this rank alone, while logged values are of all ranks. With a split dictionary
            `fired` is of this device's latents.

        Raises:
            ValueError: If `batch` is not of shape [batch, d_in], or is on another device.
            FloatingPointError: If the loss is not finite; the message says at which step.
        """
        require_batch(batch, self.d_in)
        require_on(self.W_dec.device, batch, "activations")
        if not self.is_trained:  # in a training loop without Lightning's hooks
            self._start_from(batch)
        x = self.scaled(batch)
        outcome = self._evaluate(x)
        together, n = self._of_all_ranks(outcome), len(batch) * self.ranks.n
        trainer = trainer_of(self)
        step = 0 if trainer is None else trainer.global_step
        self._loss_check(together.loss, together.losses, x, self, step, self.ranks)
        self.count_silence(together.fired, n)
        self.n_trained += n
        self._log_step(together, self.parts.sum(together.fired.sum()) / n)
        return {
            "loss": outcome.loss,
            "fired": outcome.fired,
            "squared_error": outcome.squared_error,
        }

    @override
    def on_train_end(self) -> None:
        """Check the weights after the last step, which no later loss depends on.

        Raises:
            FloatingPointError: If weights are not finite.
        """
        require_finite_weights(self, self.trainer.global_step, self._any_part)

    def _evaluate(self, x: Float[Tensor, "batch d_in"]) -> Outcome:
        rows = self.chunk_rows or default_chunk_rows(self.d_sae, x.device.type, dense=True)
        # The revival loss depends on the error of the whole batch.
        dense, revived = self.layout.dense, self.revive != "none" and len(self.dead_latents()) > 0
        if self.parts.n > 1 and self.rows_are_independent and len(x) > rows:
            dense, revived = self._any_part(dense, revived)
        apart = self.rows_are_independent and not revived
        if dense and apart and len(x) > rows:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return in_chunks(self.objective, x, rows, trained)
        return at_once(self.objective, x)

    def _of_all_ranks(self, outcome: Outcome) -> Outcome:
        if self.ranks.n == 1:
            return outcome
        losses = torch.stack([outcome.loss, *outcome.losses.values()])
        loss, *terms = self.ranks.mean(losses).unbind()
        return outcome._replace(
            loss=loss,
            losses=dict(zip(outcome.losses, terms, strict=True)),
            fired=self.ranks.sum(outcome.fired),
        )

    def count_silence(self, fired: Int[Tensor, " d_sae"], n: int) -> None:
        """Update `silent_for` with how often each latent fired on `n` activations."""
        self._silence.count(self.silent_for, fired, n)

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Which latents did not fire on the last `dead_after` training activations."""
        return self.silent_for >= self.dead_after

    def dead_latents(self) -> Int[Tensor, " n_dead"]:
        """Their indices. On a GPU it waits for them only where there may be some."""
        return self._silence.dead(self.silent_for, self.dead_after)

    def _log_step(self, outcome: Outcome, l0: Tensor) -> None:
        loss = outcome.loss.detach()
        dead = self.parts.mean(self.dead.float().mean())
        # Lightning reads what a progress bar may show after each batch.
        shown = self._behind(torch.stack([loss.float(), l0, dead]))
        for name, value in zip(("loss", "l0", "dead"), shown.unbind(), strict=True):
            self.log(name, value, prog_bar=True, logger=False)
        rows = {f"train/{name}": value for name, value in outcome.losses.items()}
        self.log_dict({**rows, "train/loss": loss, "train/l0": l0, "train/dead": dead})

    # The optimizer.

    def length_problems(self, total: int) -> list[str]:
        """Error messages about warm-up and decay in a run of `trainer.max_steps`."""
        return schedule_problems(self.lr_warmup_steps, self.lr_decay_steps, total)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters, in groups that may have different learning rates."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Fused Adam with warm-up and decay of the learning rate.

        Without a trainer, which calls callbacks, its steps also keep decoder rows at norm 1.
        """
        trainer: Any = trainer_of(self)
        brief = trainer is not None and trainer.fast_dev_run
        found = adam_with_schedule(
            self.parameter_groups(),
            lr=self.lr,
            betas=self.betas,
            warmup=0 if brief else self.lr_warmup_steps,
            decay=0 if brief else self.lr_decay_steps,
            total=-1 if trainer is None else trainer.max_steps,
            # A fused step unscales fp16 gradients itself, which Lightning cannot clip.
            fused=trainer is None or trainer.precision != "16-mixed",
        )
        if trainer is None and self.decoder_norm == "unit":
            keep_unit_rows(found["optimizer"], self.W_dec)
        return found

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's `gradient_clip_val` if it is set, else by `clip_grad_norm`.

        Lightning refuses to clip for a fused optimizer in any mixed precision, although the problem
        is only the scaled gradients of fp16, for which Adam is not fused here.
        """
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.clip_grad_norm, "norm"
        norm = None if self.parts.n == 1 else self.gradient_norm()
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, norm)

    def gradient_norm(self) -> Float[Tensor, ""]:
        """The joint Euclidean norm of all gradients, over all latents."""
        gradients = {k: w.grad for k, w in self.named_parameters() if w.grad is not None}
        if self.parts.n == 1:
            return nn.utils.get_total_norm(gradients.values())
        return norm_over_parts(gradients, self.latent_axes(), self.parts)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Remove the gradients, and reuse their memory for the next ones.

        A callback that needs a gradient after its step has to copy it.
        """
        # Only sparse steps reuse it, and with several ranks DDP's buckets may hold it.
        if not self.layout.dense and copies_of(self.trainer).n == 1:
            self.layout.workspace.recycle(parameter.grad for parameter in self.parameters())
        optimizer.zero_grad()

    @override
    def _apply(self: SAE, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        """As a module's (`to`, `half`, ...), but keep `kept_in_float32` in float32 or more."""
        kept = {name: getattr(self, name).detach() for name in self.kept_in_float32}
        try:
            super()._apply(fn, recurse)
        except NotImplementedError as error:  # of torch, for weights without values
            raise ValueError(
                "Expected weights with values but they are on the device `meta`: build the SAE "
                f"outside of `torch.device('meta')`. ({first_line(error)})"
            ) from error
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype.itemsize < min(4, before.dtype.itemsize):
                now.data, now.grad = before.to(now.device), None
        return self
