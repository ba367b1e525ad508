import jaxtyping
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sae.architectures.relu import ReLUSAE
from lightning_sae.callbacks.resampling import DeadFeatureResampling

# These runs train only.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

REFUSED = [
    ({"every_n_steps": 0}, "`every_n_steps` to be at least 1 .* but got 0"),
    ({"window": 5}, "`window` to be at most `every_n_steps`=4 but got 5"),
    ({"window": 0}, "`window` to be at least 1 .* but got 0"),
    ({"min_frequency": 0.0}, "`min_frequency` to be between 0 and 1 but got 0.0"),
    ({"n_inputs": 0}, "`n_inputs` to be positive but got 0"),
    ({"encoder_scale": 0.0}, "`encoder_scale` to be positive but got 0.0"),
    ({"max_resamplings": 0}, "`max_resamplings` to be positive, or null for no limit but got 0"),
    (
        {"every_n_steps": 0.5, "window": 0.6},
        "`window` to be at most `every_n_steps`=0.5 but got 0.6",
    ),
    ({"stop_after_step": 3}, "`stop_after_step` to be at least `every_n_steps`=4, .* but got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeadFeatureResampling(**{"every_n_steps": 4, **arguments})


def test_an_unknown_scheme_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without its checks
    with pytest.raises(ValueError, match="`scheme` to be one of .*reinitialize.* but got anneal"):
        DeadFeatureResampling(4, "anneal")  # type: ignore[arg-type]


def refused_by(callbacks, sae, message, **kwargs):
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    flags = {**dict.fromkeys(silent, False), "max_epochs": 1, "accelerator": "cpu", **kwargs}
    batches = DataLoader(torch.randn(2, 4, 6), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Trainer(callbacks=callbacks, **flags).fit(sae, batches)


def test_a_run_too_short_for_a_single_resampling_is_refused():
    message = "less than `trainer.max_steps`=4 but got 4.*lower it, .* or remove"
    refused_by([DeadFeatureResampling(4)], ReLUSAE(6, 6), message, max_steps=4)


def test_another_optimizer_than_adam_is_refused():
    class Plain(ReLUSAE):
        def configure_optimizers(self):
            return SGD(self.parameters())

    refused_by(
        [DeadFeatureResampling(4)],
        Plain(6, 6),
        "moments of Adam .* but the optimizer is SGD: use one or",
    )


def test_two_of_them_are_refused():
    class Mine(DeadFeatureResampling):
        pass

    refused_by(
        [DeadFeatureResampling(4), Mine(4)],
        ReLUSAE(6, 6),
        "Expected one `DeadFeatureResampling` but.*remove all but one",
    )


def test_a_module_without_encoder_and_decoder_is_refused():
    class Line(LightningModule):
        def training_step(self, batch, batch_idx):
            raise NotImplementedError

        def configure_optimizers(self):
            raise NotImplementedError

    refused_by(
        [DeadFeatureResampling(4)],
        Line(),
        "untied parameters `W_enc`, .* which Line is not: remove",
    )


def test_an_sae_whose_encoder_is_not_a_parameter_of_its_own_is_refused():
    class Tied(ReLUSAE):
        def __init__(self):
            super().__init__(6, 6)
            del self.W_enc

        @property
        def W_enc(self):
            return self.W_dec.T

    refused_by(
        [DeadFeatureResampling(4)],
        Tied(),
        "untied parameters `W_enc`, .* which Tied is not: remove",
    )
