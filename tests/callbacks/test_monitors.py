"""One small run with all that watches it, read back from what its loggers kept."""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_sae import ActivationDataModule, JumpReLUSAE, ReLUSAE
from lightning_sae.analysis import evaluate_in_model
from lightning_sae.callbacks import (
    Histograms,
    L1Warmup,
    LatentFigures,
    RunOverview,
    SplicedLossMonitor,
    StepMonitor,
    StreamMonitor,
    TopContexts,
)
from lightning_sae.callbacks.latent_figures import frequency_over_training
from lightning_sae.callbacks.loggers import (
    NamedValues,
    histogram,
    log_figure,
    log_histograms,
    log_table,
)
from lightning_sae.callbacks.top_contexts import spelled

N_TOKENS = 512


class OnlyNumbers(Logger):
    """A logger that holds numbers alone, and says so."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not all(isinstance(value, int | float) for value in metrics.values()):
            raise TypeError("numbers alone")
        assert step is not None
        self.values.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings = {**self.settings, **params}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not held")


class GradientNorms(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        squares = sum(float(p.grad.double().pow(2).sum()) for p in pl_module.parameters())
        self.found.append(math.sqrt(squares))


def data() -> ActivationDataModule:
    return ActivationDataModule(
        "blocks.1.hook_resid_post",
        context_length=32,
        blocks_per_pass=8,
        batch_size=128,
        buffer_size=512,
        n_validation=N_TOKENS,
        scale=True,
    )


def fit(
    root: Path, sae: Any, callbacks: list[Callback], loggers: Any, **arguments: Any
) -> tuple[Trainer, ActivationDataModule]:
    trainer = Trainer(
        max_steps=6,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        log_every_n_steps=2,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=root,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    its = data()
    trainer.fit(sae, datamodule=its)
    return trainer, its


def new_sae() -> ReLUSAE:
    seed_everything(3, verbose=False)
    return ReLUSAE(
        128,
        64,
        l1_coefficient=0.5,
        lr=3e-4,
        lr_warmup_steps=4,
        lr_decay_steps=0,
        orthogonality_coefficient=1.0,
    )


class Run:
    """A run, and what its loggers kept."""

    def __init__(self, root: Path) -> None:
        self.sae, self.numbers, self.norms = new_sae(), OnlyNumbers(), GradientNorms()
        self.figures, self.spliced = LatentFigures(), SplicedLossMonitor(N_TOKENS)
        callbacks = [
            L1Warmup(4),
            StepMonitor(),
            self.norms,
            StreamMonitor(),
            self.spliced,
            Histograms(),
            self.figures,
            RunOverview(),
            TopContexts(N_TOKENS, n_latents=5, n_rows=20),
        ]
        tensorboard = TensorBoardLogger(root, "tb", "", default_hp_metric=False)
        table = CSVLogger(root, "csv", "")
        self.folder = root / "tb"
        _, self.data = fit(root, self.sae, callbacks, [tensorboard, table, self.numbers])
        sizes = {"images": 0, "tensors": 0, "histograms": 0, "scalars": 0}
        self.events = EventAccumulator(str(self.folder), sizes).Reload()
        with open(root / "csv" / "metrics.csv") as file:
            self.rows = list(csv.DictReader(file))

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.events.Scalars(name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("monitors"))


def test_figures_in_the_language_model_are_those_that_a_test_gives(run: Run) -> None:
    expected = evaluate_in_model(run.sae, run.data, N_TOKENS)
    assert {"ce_clean", "ce_spliced", "ce_zero_ablation", "kl", "loss_recovered_mean"} <= set(
        expected
    )
    for name, value in expected.items():
        steps, found = zip(*run.curve(f"val/{name}"), strict=True)
        assert steps == (2, 5)
        # Ablations were run at the first validation, all else at the last.
        assert found[-1] == pytest.approx(value, rel=1e-5)


def test_watching_changes_no_weight(run: Run, tmp_path: Path) -> None:
    alone = new_sae()
    fit(tmp_path, alone, [L1Warmup(4)], False, limit_val_batches=0)
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, run.sae.state_dict()[name]), name


def test_every_logger_gets_the_same_numbers(run: Run) -> None:
    names = set(run.events.Tags()["scalars"]) - {"epoch"}
    in_table = {name for row in run.rows for name, value in row.items() if value}
    of_stand_in = {name for _, values in run.numbers.values for name in values}
    assert names == in_table - {"epoch", "step"} == of_stand_in - {"epoch"}
    assert "hp_metric" not in names
    assert {"speed/tokens_per_second", "time/language_model", "data/seen"} <= names


def test_what_is_in_force_is_that_of_the_step(run: Run) -> None:
    # Steps 2, 4 and 6, which loggers count from 0.
    assert [step for step, _ in run.curve("train/lr")] == [1, 3, 5]
    rates = [value for _, value in run.curve("train/lr")]
    assert rates == pytest.approx([3e-4 * min(1, k / 4) for k in (2, 4, 6)], rel=1e-6)
    coefficients = [value for _, value in run.curve("train/coefficient")]
    assert coefficients == pytest.approx([0.25, 0.5, 0.5])
    norms = [value for _, value in run.curve("train/gradient_norm")]
    assert norms == pytest.approx(run.norms.found[1::2], rel=1e-4)


def test_shares_of_the_time_are_shares(run: Run) -> None:
    for part in ("sae", "buffer", "validation"):
        assert all(0 <= value <= 1 for _, value in run.curve(f"time/{part}")), part
    assert all(value > 0 for _, value in run.curve("speed/activations_per_second"))


def test_threshold_is_in_the_units_of_the_activations(tmp_path: Path) -> None:
    numbers = OnlyNumbers()
    sae = JumpReLUSAE(128, 32, threshold_init=0.5, threshold_lr=1e-9)
    fit(tmp_path, sae, [StepMonitor()], numbers, limit_val_batches=0)
    found = [values["train/threshold"] for _, values in numbers.values if "train/lr" in values]
    assert found == pytest.approx([0.5 / float(sae.input_scale)] * 3, rel=1e-4)
    assert all(values["train/lr_1"] <= 1e-9 for _, values in numbers.values if "train/lr" in values)


def test_settings_and_figures_stand_side_by_side(run: Run) -> None:
    def part(tag: str) -> Any:
        content = run.events.SummaryMetadata(tag).plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(content)

    names = {info.name.tag for info in part("_hparams_/experiment").experiment.metric_infos}
    assert {"val/l0", "val/fvu", "val/loss_recovered_zero", "test/l0"} <= names
    given = part("_hparams_/session_start_info").session_start_info.hparams
    assert given["architecture"].string_value == "ReLUSAE"
    assert given["l1_coefficient"].number_value == 0.5
    assert given["run.hook_name"].string_value == "blocks.1.hook_resid_post"
    assert given["run.max_steps"].number_value == 6
    assert "betas" not in given  # the default
    assert run.numbers.settings["architecture"] == "ReLUSAE"


def test_first_page_shows_curves_that_there_are(run: Run) -> None:
    (event,) = run.events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["SAE", "Run"]
    patterns = [p for c in layout.category for chart in c.chart for p in chart.multiline.tag]
    names = run.events.Tags()["scalars"]
    for pattern in patterns:
        assert any(re.match(pattern, name) for name in names), pattern


def test_pictures_come_at_each_validation(run: Run) -> None:
    for name in (
        "frequency_over_training",
        "frequency_against_projection",
        "activations_and_thresholds",
    ):
        assert [image.step for image in run.events.Images(f"latents/{name}")] == [3, 6]


def test_latents_are_counted_by_frequency(run: Run) -> None:
    assert run.figures.steps == [3, 6]
    frequency = run.sae.held_out_frequency
    assert frequency is not None
    never, *bins = run.figures.counts[-1]
    assert never == sum(value == 0 for value in frequency.tolist())
    expected = [0] * 35
    for value in frequency.tolist():
        if value > 0:
            expected[min(34, max(0, math.floor((math.log10(value) + 7) * 5)))] += 1
    assert bins == expected
    # A resumed run goes on.
    other = LatentFigures()
    other.load_state_dict(run.figures.state_dict())
    assert (other.steps, other.counts) == (run.figures.steps, run.figures.counts)
    assert frequency_over_training(other.steps, other.counts).axes


def test_contexts_show_the_token_on_which_a_latent_fires(run: Run) -> None:
    (event,) = run.events.Tensors("latents/top_contexts/text_summary")
    header, _, *lines = event.tensor_proto.string_val[0].decode().split("\n")
    assert header == "| latent | frequency | activation | context |"
    assert len({line.split("|")[1] for line in lines}) == 5
    assert all(line.count("«") == line.count("»") == 1 for line in lines)
    latent, strongest = (
        int(lines[0].split("|")[1]),
        float(lines[0].split("|")[3].replace("&#46;", ".")),
    )
    tokens = torch.cat(list(run.data.held_out_tokens(N_TOKENS)))
    with torch.no_grad():
        f = run.sae.encode(run.data.language_model.activations(tokens))
    own = f[..., latent].flatten()
    largest = float(own.max())
    (token,) = spelled(run.data, [int(tokens.flatten()[own.argmax()])])
    assert (
        f"«{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in token)}»" in lines[0]
    )
    assert strongest == pytest.approx(largest, abs=0.01)


def test_projector_holds_decoder_rows_with_tokens(run: Run) -> None:
    assert "decoder" in (run.folder / "projector_config.pbtxt").read_text()
    (labels,) = run.folder.rglob("metadata.tsv")
    header, *lines = labels.read_text().splitlines()
    assert header.split("\t") == ["latent", "tokens", "log10 frequency"]
    (rows,) = run.folder.rglob("tensors.tsv")
    latents = [int(line.split("\t")[0]) for line in lines]
    found = torch.tensor(
        [[float(v) for v in row.split("\t")] for row in rows.read_text().splitlines()]
    )
    torch.testing.assert_close(found, run.sae.W_dec.detach()[latents])
    # The label begins with the token on which the latent's activations add up to most.
    tokens = torch.cat(list(run.data.held_out_tokens(N_TOKENS)))
    with torch.no_grad():
        f = run.sae.encode(run.data.language_model.activations(tokens))[..., latents[0]]
    kept = run.data.filter.kept(tokens, run.data.language_model.activations(tokens))
    sums = torch.zeros(run.data.language_model.vocabulary)
    sums.index_add_(0, tokens[kept], f[kept])
    (token,) = spelled(run.data, [int(sums.argmax())])
    assert lines[0].split("\t")[1].startswith(token)


def test_a_logger_of_one_of_several_saes_prefixes_images_with_its_name() -> None:
    kept: dict[str, Any] = {}

    class Experiment(io.StringIO):
        def add_figure(self, tag, figure, global_step):
            kept[tag] = global_step

        def add_histogram(self, tag, values, global_step):
            kept[tag] = global_step

    class Pictures(OnlyNumbers):
        experiment = Experiment()

    loggers = [NamedValues(Pictures(), "relu"), NamedValues(OnlyNumbers(), "gated"), OnlyNumbers()]
    log_figure(loggers, "a", frequency_over_training([1], [[1] * 36]), 3)
    log_histograms(loggers, {"b": torch.ones(3)}, 4)
    log_table(loggers, "c", ["x"], [["y"]], 5)
    assert kept == {"relu/a": 3, "relu/b": 4}


def test_values_that_differ_in_their_last_digit_have_a_histogram() -> None:
    counts, edges = histogram(torch.tensor([1.0, 1.0, 1.0 + 2**-23]))
    assert len(edges) == len(counts) + 1
    assert sum(counts) == 3


def test_number_of_tokens_is_not_negative() -> None:
    with pytest.raises(ValueError, match="`n_tokens` to be at least 0 but got -1"):
        SplicedLossMonitor(-1)
    with pytest.raises(ValueError, match="`n_rows` to be positive but got 0"):
        TopContexts(n_rows=0)
