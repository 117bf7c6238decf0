"""Engines: how a model is distributed over processes and stepped; see `engine.protocol`."""

from cpm_bee.engine.protocol import (
    Engine,
    OptimizerSettings,
    StepResult,
    TensorStatistics,
)

__all__ = ["Engine", "OptimizerSettings", "StepResult", "TensorStatistics"]
