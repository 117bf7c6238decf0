"""Engines distribute a model over processes and step it; see `engine.protocol`."""

from cpm_bee.engine.protocol import (
    Engine,
    OptimizerSettings,
    StepResult,
    TensorStatistics,
)

__all__ = ["Engine", "OptimizerSettings", "StepResult", "TensorStatistics"]
