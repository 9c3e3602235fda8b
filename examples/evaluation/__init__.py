"""Predicting and scoring."""

from examples.evaluation.prediction import (
    Collate,
    EvaluationSet,
    PlainPredictor,
    Prediction,
    Predictor,
    evaluate,
    on_device,
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
    "variant_metric",
    "evaluate",
    "on_device",
    "predict",
    "summary_metrics",
]
