"""The metrics of GLUE, from their formulas; nothing is downloaded.

Where a formula divides by zero, the value is 0: Matthews of constant predictions or labels, F1
without a true positive, and also Pearson and Spearman of constant predictions, which have no
correlation to speak of. (An undefined value would win or lose every comparison between
checkpoints.) Predictions that are not finite raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from examples.data.tasks import Task

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose prediction is their label."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """2·TP / (2·TP + FP + FN) of class 1."""
    hits = float(np.sum((predictions == 1) & (labels == 1)))
    errors = float(np.sum((predictions == 1) != (labels == 1)))
    return 2.0 * hits / (2.0 * hits + errors) if hits else 0.0


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of predictions and labels as indicator vectors, for any number of classes.

    (c·n − Σₖ pₖtₖ) / √((n² − Σₖ pₖ²)(n² − Σₖ tₖ²)) with c correct rows of n, and pₖ, tₖ rows
    predicted and labelled k (Gorodkin 2004); for two classes it is Matthews' coefficient.
    """
    size = int(max(predictions.max(), labels.max())) + 1
    p = np.bincount(predictions, minlength=size).astype(np.float64)
    t = np.bincount(labels, minlength=size).astype(np.float64)
    n = float(len(labels))
    spread = (n * n - p @ p) * (n * n - t @ t)
    agreement = float(np.sum(predictions == labels)) * n - p @ t
    return float(agreement / np.sqrt(spread)) if spread else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Σ x·y / √(Σ x²·Σ y²) of the centred values."""
    x = predictions.astype(np.float64) - np.mean(predictions, dtype=np.float64)
    y = labels.astype(np.float64) - np.mean(labels, dtype=np.float64)
    # Rounding leaves constant values a spread of about one part in 10¹⁶ of their size.
    tiny = 1e-14 * max(1.0, float(np.max(np.abs(predictions))), float(np.max(np.abs(labels))))
    if np.max(np.abs(x)) <= tiny or np.max(np.abs(y)) <= tiny:
        return 0.0
    x, y = x / np.max(np.abs(x)), y / np.max(np.abs(y))
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def spearmanr(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(labels))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}


def predict(task: Task, logits: np.ndarray) -> np.ndarray:
    """(n, labels) logits to (n,) classes, or to (n,) scores of a regression."""
    return logits[:, 0] if task.regression else np.argmax(logits, axis=1)


def compute(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics of a task, and their mean as `combined_score` where there are several.

    Args:
        task: names the metrics.
        logits: (n, num_labels).
        labels: (n,) classes or scores.

    Raises:
        ValueError: a logit is not finite, or there is no row.
    """
    if len(logits) == 0:
        raise ValueError("there is no row to score")
    if not np.isfinite(logits).all():
        rows = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ValueError(
            f"the logits of {rows} of {len(logits)} rows are not finite: training has diverged; "
            "lower --learning_rate, or use --mixed_precision bf16 or no instead of fp16"
        )
    predictions = predict(task, logits)
    values = {name: METRICS[name](predictions, labels) for name in task.metrics}
    if len(values) > 1:
        values["combined_score"] = sum(values.values()) / len(values)
    return values
