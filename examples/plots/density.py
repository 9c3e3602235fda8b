"""Pictures of pruning: what is left of every layer, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.plots.canvas import canvas
from examples.plots.ranks import split_name

MARKS = "osv^D<>*XP"


class Point(NamedTuple):
    """A run, or the mean of several.

    Attributes:
        density: share of the encoder's weights that is left.
        value: of the metric.
        milliseconds: of its model without the head; None: not measured.
        spread: standard deviation of the metric.
    """

    density: float
    value: float
    milliseconds: float | None = None
    spread: float = 0.0


def layer_densities(path: Path, shares: Mapping[str, float], title: str) -> None:
    """Shares that are left, over the layers, one line for every kind of module.

    Args:
        path: of the PNG.
        shares: module → share of its blocks, heads or units.
        title: the run in a few words.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, share in shares.items():
        layer, kind = split_name(name.removeprefix("base_model.model."))
        lines.setdefault(kind, []).append((layer, share))
    pyplot = canvas()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (kind, points) in enumerate(lines.items()):
        layers, values = zip(*sorted(points), strict=True)
        label, size = kind.removesuffix(".dense"), max(2.0, 9.0 - 1.2 * i)  # equal ones stay seen
        axes.plot(layers, values, MARKS[i % len(MARKS)], ls="-", ms=size, mfc="none", label=label)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("share that is left")
    axes.set_ylim(0.0, 1.03)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def pruning_curve(
    path: Path, series: Mapping[str, Sequence[Point]], metric: str, title: str
) -> None:
    """A metric over density and, where it was measured, over the time of the compacted model.

    Args:
        path: of the PNG.
        series: what runs have in common → their points.
        metric: its name.
        title: what is shown, in a few words.
    """
    timed = any(p.milliseconds is not None for points in series.values() for p in points)
    pyplot = canvas()
    width = 10 if timed else 5.5
    figure, panels = pyplot.subplots(
        1, 1 + timed, figsize=(width, 4), layout="constrained", squeeze=False, sharey=True
    )
    for i, (label, points) in enumerate(series.items()):
        line = {"marker": MARKS[i % len(MARKS)], "ms": 5, "lw": 1.2, "capsize": 2, "label": label}
        points = sorted(points)
        values, spreads = [p.value for p in points], [p.spread for p in points]
        panels[0, 0].errorbar([100 * p.density for p in points], values, spreads, **line)
        if all(p.milliseconds is not None for p in points):
            panels[0, 1].errorbar([p.milliseconds for p in points], values, spreads, **line)
    panels[0, 0].set_xlabel("% of the encoder's weights")
    panels[0, 0].set_ylabel(metric)
    if timed:
        panels[0, 1].set_xlabel("ms a batch, compacted")
    for axes in panels.flat:
        axes.set_xlim(0, 1.05 * axes.dataLim.x1)
        axes.grid(alpha=0.25)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
