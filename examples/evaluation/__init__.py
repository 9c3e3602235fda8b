"""Predicting and scoring.

Metrics need no torch; predicting does. So what predicts is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.evaluation.prediction import (
        Collate,
        EvaluationSet,
        PlainPredictor,
        Prediction,
        Predictor,
        evaluate,
        predict,
        summary_metrics,
        variant_metric,
    )

__all__ = [
    "Collate",
    "EvaluationSet",
    "PlainPredictor",
    "Prediction",
    "Predictor",
    "evaluate",
    "predict",
    "summary_metrics",
    "variant_metric",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("examples.evaluation.prediction"), name)
