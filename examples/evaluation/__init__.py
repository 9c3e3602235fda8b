"""Predicting and scoring."""

from examples.evaluation.prediction import (
    Collate,
    EvaluationSet,
    PlainPredictor,
    Prediction,
    Predictor,
    at_view,
    evaluate,
    on_device,
    predict,
    worth_showing,
)

__all__ = [
    "Collate",
    "EvaluationSet",
    "PlainPredictor",
    "Prediction",
    "Predictor",
    "at_view",
    "evaluate",
    "on_device",
    "predict",
    "worth_showing",
]
