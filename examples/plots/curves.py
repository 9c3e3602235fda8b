"""Metrics over training and over ranks, as PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.plots.canvas import canvas

LogLines = list[dict[str, Any]]


def learning_curve(
    path: Path,
    log: LogLines,
    metrics: LogLines,
    main_metric: str,
    title: str,
) -> str | None:
    """Draws losses and the main metric over epochs.

    Args:
        path: of the PNG.
        log: lines of `log.jsonl`.
        metrics: lines of `metrics.jsonl`.
        main_metric: the metric that chooses the best weights; its best point is marked.
        title: the run in a few words.

    Returns:
        Why there is no picture, or None.
    """
    if not metrics and not log:
        return "no learning curve: nothing was logged"
    try:
        pyplot = canvas()
    except ImportError as error:
        return f"no learning curve: {error}"
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    curve, loss = (log, "loss") if log else (metrics, "train_loss")
    left.plot(_of(curve, "epoch"), _of(curve, loss), color="0.4", lw=1.2, label="training loss")
    with_loss = [row for row in metrics if "eval_loss" in row]
    if with_loss:
        left.plot(
            _of(with_loss, "epoch"),
            _of(with_loss, "eval_loss"),
            "s-",
            color="tab:orange",
            ms=3,
            label="validation loss",
        )
    left.set_xlabel("epoch")
    left.set_ylabel("loss")
    left.set_ylim(bottom=0)
    scored = [row for row in metrics if main_metric in row]
    if scored and not main_metric.endswith("loss"):
        _metric(left.twinx(), scored, main_metric)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    left.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def _metric(axes: Any, rows: LogLines, name: str) -> None:
    values, epochs = _of(rows, name), _of(rows, "epoch")
    best = max(range(len(values)), key=values.__getitem__)
    axes.plot(epochs, values, "o-", color="tab:blue", ms=4, label=name)
    axes.plot(
        epochs[best],
        values[best],
        "*",
        color="tab:blue",
        ms=13,
        label=f"best: {values[best]:.4f} at epoch {epochs[best]:g}",
    )
    axes.set_ylabel(name, color="tab:blue")


def _of(rows: LogLines, name: str) -> list[float]:
    return [row[name] for row in rows]


def rank_curve(
    path: Path,
    ranks: list[int],
    values: list[float],
    chosen: dict[str, Any],
    metric: str,
    title: str,
    tolerance: float,
) -> str | None:
    """Draws a metric over the rank an adapter is cut to.

    Args:
        path: of the PNG.
        ranks: ascending.
        values: of the metric, one per rank.
        chosen: `best_rank` and `smallest_rank`, which are marked; `aurac_linear`, `aurac_log2`.
        metric: its name.
        title: the run in a few words.
        tolerance: the band below (for a loss, above) the best value that is shaded.

    Returns:
        Why there is no picture, or None.
    """
    try:
        pyplot = canvas()
    except ImportError as error:
        return f"no rank curve: {error}"
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    best = values[ranks.index(chosen["best_rank"])]
    worst = best + tolerance if metric.endswith("loss") else best - tolerance
    axes.axhspan(worst, best, color="0.92", label=f"within {tolerance:g} of the best")
    axes.plot(ranks, values, "o-", color="tab:blue", ms=4)
    for name, marker, size in (("best_rank", "*", 13), ("smallest_rank", "s", 8)):
        rank = chosen[name]
        value = values[ranks.index(rank)]
        label = f"{name.replace('_', ' ')}: {value:.4f} at {rank}"
        axes.plot(rank, value, marker, color="tab:blue", ms=size, mfc="none", ls="", label=label)
    axes.set_xticks(ranks)
    areas = f"{chosen['aurac_linear']:.4f} linear, {chosen['aurac_log2']:.4f} over log₂ rank"
    axes.set_xlabel(f"rank (area under the curve: {areas})")
    axes.set_ylabel(metric)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def budget_curve(path: Path, content: dict[str, Any], title: str) -> str | None:
    """Draws a metric over the number of singular values that are left of an adapter.

    Args:
        path: of the PNG.
        content: `budgets`, `metric`, and `values` with `aurac_linear` of each of `global`
            (one threshold for all matrices) and `uniform` (the same rank everywhere).
        title: the run in a few words.

    Returns:
        Why there is no picture, or None.
    """
    try:
        pyplot = canvas()
    except ImportError as error:
        return f"no budget curve: {error}"
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    shown = {"global": ("one threshold", "o-"), "uniform": ("the same rank", "s--")}
    for rule, (words, line) in shown.items():
        label = f"{words} (area {content[rule]['aurac_linear']:.4f})"
        axes.plot(content["budgets"], content[rule]["values"], line, ms=4, label=label)
    axes.set_xlabel("singular values of all matrices together")
    axes.set_ylabel(content["metric"])
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
