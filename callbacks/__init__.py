"""Callbacks for training, checkpoints, logging and results."""

if __name__ != "lightning_sae.callbacks":
    raise ImportError(f"import lightning_sae.callbacks, not {__name__}")

from lightning_sae.architectures.decoder_norm import DecoderNormProjection as DecoderNormProjection
from lightning_sae.architectures.target_l0 import TargetL0 as TargetL0
from lightning_sae.callbacks.aux_threshold_warmup import AuxThresholdWarmup as AuxThresholdWarmup
from lightning_sae.callbacks.checkpoint import RunCheckpoint as RunCheckpoint
from lightning_sae.callbacks.histograms import Histograms as Histograms
from lightning_sae.callbacks.l1_warmup import L1Warmup as L1Warmup
from lightning_sae.callbacks.latent_figures import LatentFigures as LatentFigures
from lightning_sae.callbacks.orthogonal_to import OrthogonalTo as OrthogonalTo
from lightning_sae.callbacks.overview import RunOverview as RunOverview
from lightning_sae.callbacks.progress import SAEProgressBar as SAEProgressBar
from lightning_sae.callbacks.resampling import DeadFeatureResampling as DeadFeatureResampling
from lightning_sae.callbacks.results import ExportSAE as ExportSAE
from lightning_sae.callbacks.results import HeldOutEvaluation as HeldOutEvaluation
from lightning_sae.callbacks.results import LatentWriter as LatentWriter
from lightning_sae.callbacks.spliced_loss import SplicedLossMonitor as SplicedLossMonitor
from lightning_sae.callbacks.step_monitor import StepMonitor as StepMonitor
from lightning_sae.callbacks.stream_monitor import StreamMonitor as StreamMonitor
from lightning_sae.callbacks.top_contexts import TopContexts as TopContexts

__all__ = [
    "AuxThresholdWarmup",
    "DeadFeatureResampling",
    "DecoderNormProjection",
    "ExportSAE",
    "HeldOutEvaluation",
    "Histograms",
    "L1Warmup",
    "LatentFigures",
    "LatentWriter",
    "OrthogonalTo",
    "RunCheckpoint",
    "RunOverview",
    "SAEProgressBar",
    "SplicedLossMonitor",
    "StepMonitor",
    "StreamMonitor",
    "TargetL0",
    "TopContexts",
]
