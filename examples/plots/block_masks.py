"""Pictures of block masks: the masks themselves, their histogram over training, the features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.plots.canvas import canvas
from examples.plots.ranks import split_name

FEATURE_TITLES = ("mean |gradient|", "gradient variance", "input variance", "weight norm")


def _grid(names: list[str]) -> tuple[list[int], list[str], dict[str, tuple[int, int]]]:
    """Layers from the last to the first, kinds, and each matrix's place among them."""
    parts = {name: split_name(name.removeprefix("base_model.model.")) for name in names}
    layers = sorted({layer for layer, _ in parts.values()}, reverse=True)
    kinds = list(dict.fromkeys(kind for _, kind in parts.values()))
    return layers, kinds, {n: (layers.index(a), kinds.index(k)) for n, (a, k) in parts.items()}


def _draw_grid(path: Path, maps: Mapping[str, Tensor], label: str, title: str, **scale: Any) -> Any:
    """One heat map per matrix, layer × module, on one scale."""
    layers, kinds, places = _grid(list(maps))
    pyplot = canvas()
    figure, axes = pyplot.subplots(
        len(layers), len(kinds), figsize=(1.8 + 1.7 * len(kinds), 1.2 + 1.5 * len(layers)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    image = None
    for name, values in maps.items():
        row, column = places[name]
        image = axes[row, column].imshow(
            values.numpy(), aspect="auto", interpolation="nearest", **scale
        )
    for row, layer in enumerate(layers):
        axes[row, 0].set_ylabel("–" if layer < 0 else f"layer {layer}", fontsize="small")
    for column, kind in enumerate(kinds):
        short = kind.removeprefix("attention.self.").removesuffix(".dense")
        axes[0, column].set_title(short, fontsize="small")
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def block_masks(path: Path, masks: Mapping[str, Tensor], title: str) -> None:
    """m of every matrix as a heat map, rows = blocks of outputs.

    Args:
        path: of the PNG.
        masks: module name -> m, (p, q).
        title: the run in a few words.
    """
    everything = torch.cat([m.flatten() for m in masks.values()])
    heading = f"{title}\n{len(everything)} blocks, mean {everything.mean():.3f}"
    _draw_grid(path, masks, "mask", heading, vmin=0.0, vmax=1.0, cmap="viridis")


def feature_maps(path: Path, features: Any, title: str) -> None:
    """The four measured features, a picture each: `<path's stem>_1.png` … `_4.png`.

    Logarithms, from the 1st to the 99th percentile of all blocks.

    Args:
        path: what the pictures' names come from.
        features: `peft_custom.tuners.bim_lora.features.Features`.
        title: the run in a few words.
    """
    for k, what in enumerate(FEATURE_TITLES):
        logs = features.values[:, k].double().clamp(min=1e-30).log10().cpu()
        low, high = (float(np.percentile(logs.numpy(), q)) for q in (1, 99))
        maps = {part.name: part.view(logs) for part in features.table}
        where = path.with_name(f"{path.stem}_{k + 1}.png")
        _draw_grid(where, maps, f"log10 {what}", f"{title}\n{what}",
                   vmin=low, vmax=max(high, low + 1e-9), cmap="magma")  # fmt: skip


def mask_history(path: Path, history: Mapping[str, Any], title: str) -> None:
    """How many blocks have which mask, over the steps of training.

    Args:
        path: of the PNG.
        history: `steps`, and `counts`: per step a histogram over [0, 1].
        title: the run in a few words.
    """
    counts = torch.stack([c.double() for c in history["counts"]])  # (snapshots, bins)
    shares = (counts / counts.sum(1, keepdim=True)).T.numpy()
    steps = history["steps"]
    pyplot = canvas()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    edges = np.linspace(0.0, 1.0, shares.shape[0] + 1)
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    image = axes.pcolormesh([*steps, steps[-1] + width], edges, shares, cmap="magma_r")
    centres = (edges[:-1] + edges[1:]) / 2.0
    axes.plot(steps, centres @ shares, color="tab:cyan", lw=1.5, label="mean")
    axes.set_xlabel("step")
    axes.set_ylabel("mask")
    axes.legend(frameon=False)
    figure.colorbar(image, label="share of the blocks")
    axes.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
