"""How far predicted probabilities can be trusted: negative log-likelihood, calibration, entropy."""

from __future__ import annotations

import numpy as np


def nll(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """−(1/n) Σᵢ log p(yᵢ | xᵢ), the mean negative log-likelihood, in nats.

    Args:
        log_probabilities: (n, classes).
        labels: (n,) classes.
    """
    return float(-np.mean(log_probabilities[np.arange(len(labels)), labels]))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Σ_b |B_b|/n · |accuracy(B_b) − confidence(B_b)|, the expected calibration error.

    Rows are put into `bins` bins of equal width by their confidence, the largest probability: B_b
    holds those in ((b − 1)/bins, b/bins] (Guo et al. 2017, equation 3).

    Args:
        probabilities: (n, classes).
        labels: (n,) classes.
        bins: how many.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    own = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(own, weights=right - confidence, minlength=bins)  # |B_b|·(acc − conf)
    return float(np.abs(gaps).sum() / len(labels))


def entropy(log_probabilities: np.ndarray) -> float:
    """−(1/n) Σᵢ Σ_c p_c(xᵢ)·log p_c(xᵢ), the mean entropy of the predictions, in nats."""
    p = np.exp(log_probabilities)
    terms = p * np.where(p > 0, log_probabilities, 0.0)
    return float(-np.mean(terms.sum(axis=1)))


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`nll`, `ece` and `entropy` of softmax(logits); log-probabilities are their own softmax.

    Args:
        logits: (n, classes).
        labels: (n,) classes.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return {
        "nll": nll(logs, labels),
        "ece": calibration_error(np.exp(logs), labels),
        "entropy": entropy(logs),
    }
