"""Pictures of a posterior over the weights, drawn at the end of a run by `--plots`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.plots.canvas import canvas


def posterior_histograms(
    path: Path, values: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str
) -> None:
    """Histograms of σ and of |μ|/σ over all weights of a kind; zeros are in the first bin.

    Args:
        path: of the PNG.
        values: kind of weights -> (μ, σ), flat.
        title: the run in a few words.
    """
    pyplot = canvas()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    sigmas = {kind: sigma for kind, (_, sigma) in values.items()}
    ratios = {kind: np.abs(mu) / sigma for kind, (mu, sigma) in values.items()}
    for axes, found, label in ((left, sigmas, "σ"), (right, ratios, "|μ| / σ")):
        every = np.concatenate([v[v > 0] for v in found.values()]).astype(np.float64)
        low, high = np.quantile(every, [0.001, 1.0])
        wide = high > 10 * low
        bins = (np.geomspace if wide else np.linspace)(low, max(high, low * (1 + 1e-6)), 80)
        for kind, v in found.items():
            shares = np.full(len(v), 100.0 / len(v))
            v = np.clip(v.astype(np.float64), bins[0], bins[-1])
            spread = np.std(v) / np.mean(v)
            name = f"{kind} (s.d./mean {spread:.1g})" if found is sigmas else kind
            axes.hist(v, bins, weights=shares, histtype="step", label=name)
        axes.set_xscale("log" if wide else "linear")
        if not wide:
            axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(label)
        axes.set_ylabel("% of the weights of a kind")
        axes.legend(fontsize="small", frameon=False)
    right.axvline(1.0, color="0.7", lw=0.8, zorder=0)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
