"""What a planned run costs on this machine: time by stage, memory, the stream, hours."""

from lightning_sae.bench.trainer import BenchTrainer as BenchTrainer

__all__ = ["BenchTrainer"]
