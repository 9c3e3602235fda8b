"""GLUE's metrics against scikit-learn and scipy, and what they do where a formula has no value."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data.tasks import get_task
from examples.evaluation import calibration
from examples.evaluation import glue as metrics

sklearn = pytest.importorskip("sklearn.metrics")
pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")


def labels(classes: int) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    row = st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1))
    return st.lists(row, min_size=1, max_size=40).map(
        lambda rows: tuple(map(list, zip(*rows, strict=True)))
    )


@settings(deadline=None, max_examples=150)
@given(labels(2))
def test_binary_metrics_equal_scikit_learn(rows):
    predicted, true = map(np.asarray, rows)
    assert metrics.accuracy(predicted, true) == pytest.approx(
        sklearn.accuracy_score(true, predicted)
    )
    assert metrics.f1(predicted, true) == pytest.approx(
        sklearn.f1_score(true, predicted, zero_division=0)
    )
    assert metrics.matthews_correlation(predicted, true) == pytest.approx(
        sklearn.matthews_corrcoef(true, predicted)
    )


@settings(deadline=None, max_examples=100)
@given(labels(4))
def test_matthews_of_many_classes_equals_scikit_learn(rows):
    predicted, true = map(np.asarray, rows)
    assert metrics.matthews_correlation(predicted, true) == pytest.approx(
        sklearn.matthews_corrcoef(true, predicted), abs=1e-12
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(0, 25)), min_size=3, max_size=30))
def test_correlations_equal_scipy(rows):
    from scipy import stats

    x = np.array([row[0] for row in rows], np.float32)
    y = np.array([row[1] / 5 for row in rows], np.float32)
    if np.ptp(x) < 1e-3 or np.ptp(y) == 0:
        return
    expected = stats.pearsonr(x.astype(np.float64), y.astype(np.float64)).statistic
    assert metrics.pearson(x, y) == pytest.approx(expected, abs=1e-9)
    assert metrics.spearmanr(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 2.3, 1e8, -0.1])
def test_constant_predictions_have_no_correlation(value):
    constant, true = np.full(9, value, np.float32), np.arange(9, dtype=np.float32)
    assert metrics.pearson(constant, true) == 0.0
    assert metrics.spearmanr(constant, true) == 0.0
    ones = np.ones(9, np.int64)
    assert metrics.matthews_correlation(ones, np.arange(9) % 2) == 0.0
    assert metrics.f1(np.zeros(9, np.int64), ones) == 0.0


def test_tasks_report_their_metrics_and_the_mean_of_several():
    logits = np.array([[0.2, 0.9], [1.0, -1.0], [0.0, 0.1], [2.0, 0.0]], np.float32)
    found = metrics.compute(get_task("mrpc"), logits, np.array([1, 0, 0, 0]))
    assert found == {
        "accuracy": 0.75,
        "f1": pytest.approx(2 / 3),
        "combined_score": pytest.approx(17 / 24),
    }
    assert list(metrics.compute(get_task("cola"), logits, np.array([1, 0, 0, 0]))) == [
        "matthews_correlation"
    ]
    scores = metrics.compute(get_task("stsb"), logits[:, :1], np.array([1.0, 2.0, 0.5, 5.0]))
    assert list(scores) == ["pearson", "spearmanr", "combined_score"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = np.array([[0.2, bad], [1.0, -1.0]], np.float32)
    with pytest.raises(ValueError, match="1 of 2 rows are not finite"):
        metrics.compute(get_task("mrpc"), logits, np.array([1, 0]))
    with pytest.raises(ValueError, match="no row"):
        metrics.compute(get_task("mrpc"), logits[:0], np.array([], np.int64))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from([1, 7, 50]))
def test_calibration_is_the_formulas_row_by_row(seed, classes, n):
    """Bins are open below and closed above; the gaps are weighted by their share of rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes)).astype(np.float32)
    true = rng.integers(0, classes, n)
    p = [[math.exp(x - math.log(sum(map(math.exp, row)))) for x in row] for row in logits.tolist()]
    bins = {}
    for row, label in zip(p, true, strict=True):
        which = next(b for b in range(15) if max(row) <= (b + 1) / 15 + 1e-15)
        bins.setdefault(which, []).append((row.index(max(row)) == label, max(row)))
    gaps = [
        len(rows) / n * abs(np.mean([right for right, _ in rows]) - np.mean([c for _, c in rows]))
        for rows in bins.values()
    ]
    found = calibration.calibration(logits, true)
    nll = -sum(math.log(row[label]) for row, label in zip(p, true, strict=True)) / n
    entropy = -sum(x * math.log(x) for row in p for x in row) / n
    assert found == pytest.approx({"nll": nll, "ece": sum(gaps), "entropy": entropy}, abs=1e-6)


def test_a_confidence_on_the_border_belongs_to_the_lower_bin():
    p = np.array([[0.75, 0.25], [0.7, 0.3]])  # of four bins both are in (0.5, 0.75]
    right = np.array([1, 0])
    assert calibration.calibration_error(p, right, bins=4) == pytest.approx(0.225)


def test_certain_predictions_have_finite_calibration():
    found = calibration.calibration(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 1]))
    assert found == {"nll": 0.0, "ece": 0.0, "entropy": 0.0}


def test_metrics_import_no_torch():
    code = "import examples.evaluation.glue, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
