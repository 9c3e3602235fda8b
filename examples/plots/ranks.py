"""Pictures of ranks, drawn at the end of a run by `--plots`.

Numbers come in as plain dicts and lists: nothing here knows a model or a method.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.plots.canvas import canvas

NO_LAYER = -1
Ranks = Mapping[str, int]


def split_name(name: str) -> tuple[int, str]:
    """`bert.encoder.layer.3.attention.self.query` -> (3, "attention.self.query").

    The first number in a name is its layer; names without one are in `NO_LAYER`.
    """
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    if found is None:
        return NO_LAYER, name
    return int(found[1]), name[found.end() :]


def rank_heatmap(path: Path, ranks: Ranks, start: int, title: str) -> None:
    """Final ranks as a table, layer × module, coloured from 0 to the rank at the start.

    Args:
        path: of the PNG.
        ranks: module name -> rank.
        start: the rank all modules began with.
        title: the run in a few words.
    """
    cells = {split_name(name): rank for name, rank in ranks.items()}
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    table = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), rank in cells.items():
        table[layers.index(layer), kinds.index(kind)] = rank
    pyplot = canvas()
    size = (2.5 + 0.9 * len(kinds), 2.2 + 0.34 * len(layers))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=start, aspect="auto")
    for i, row in enumerate(table):
        for j, rank in enumerate(row):
            if rank == rank:
                dark = rank < 0.6 * start
                axes.text(j, i, f"{rank:.0f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(layers)), ["–" if n == NO_LAYER else str(n) for n in layers])
    axes.set_ylabel("layer")
    figure.colorbar(image, label="rank", ticks=range(0, start + 1, max(1, start // 6)))
    axes.set_title(f"{title}\n{sum(ranks.values())} triplets kept", fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def rank_trajectories(path: Path, history: Sequence[tuple[int, float, Ranks]], title: str) -> None:
    """The budget and the triplets kept over training, and mean ranks by module and by layer.

    Args:
        path: of the PNG.
        history: (step, scheduled budget, module name -> rank), in order.
        title: the run in a few words.
    """
    steps = [step for step, _, _ in history]
    kept = [sum(ranks.values()) for _, _, ranks in history]
    pyplot = canvas()
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained", sharex=True
    )
    left.plot(steps, [budget for _, budget, _ in history], color="0.6", label="budget")
    left.plot(steps, kept, color="tab:blue", lw=1, label="kept")
    left.set_ylim(bottom=0)
    left.set_ylabel("triplets")
    left.legend(fontsize="small", frameon=False)
    for kind, values in _means(history, part=1).items():
        middle.plot(steps, values, lw=1.2, label=kind)
    middle.legend(fontsize="x-small", frameon=False)
    by_layer = {n: v for n, v in sorted(_means(history, part=0).items()) if n != NO_LAYER}
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, max(1, len(by_layer))))
    for (layer, values), colour in zip(by_layer.items(), colours, strict=True):
        right.plot(steps, values, lw=1.2, color=colour, label=f"layer {layer}")
    right.legend(fontsize="x-small", frameon=False, ncols=2)
    for axes, what in ((middle, "mean rank of a module"), (right, "mean rank in a layer")):
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.set_xlabel("optimiser step")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _means(history: Sequence[tuple[int, float, Ranks]], part: int) -> dict[Any, list[float]]:
    """Layer (part 0) or kind of module (part 1) -> its mean rank at every step of the history."""
    names: dict[Any, list[str]] = defaultdict(list)
    for name in history[0][2]:
        names[split_name(name)[part]].append(name)
    return {
        key: [float(np.mean([ranks[name] for name in own])) for _, _, ranks in history]
        for key, own in names.items()
    }
