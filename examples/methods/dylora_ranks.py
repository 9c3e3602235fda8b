"""DyLoRA evaluated at several ranks in one forward pass, and what is reported of them.

Metrics at rank b are `eval_r<b>_METRIC`; the plain `eval_METRIC` are those of the whole adapter,
rank R, and choose the weights. At the end of a run the best of the evaluated ranks, the smallest
one that is nearly as good and the area under the metric over the rank (AURAC) are reported, with
`rank_curve.json` and its picture.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loralib
from examples.evaluation.outputs import inputs_of, logits_of, loss_of
from examples.evaluation.prediction import Weights, variant_metric
from examples.plots.curves import rank_curve
from transformers_patched.heads import SequenceClassifierOutput

Ranks = Callable[[bool], list[int]]  # (at the end of a run) -> ranks to evaluate at; the last is R


class RankPredictor:
    """A variant `r<b>` for every rank b that the options name; the last one is R."""

    stacked = True
    probabilistic = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def variants(self, final: bool) -> list[str]:
        return [f"r{b}" for b in self.ranks(final)]

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        """One pass over the batch repeated for every rank; then each rank's logits and loss.

        A model that cannot be stacked has one pass for every rank.
        """
        if not loralib.can_batch_ranks(model):
            return [self._at(model, arguments, int(variant[1:])) for variant in variants]
        inputs = repeated(inputs_of(arguments), len(variants))
        with loralib.batched_ranks(model, [int(variant[1:]) for variant in variants]):
            logits = logits_of(model(**inputs), inputs).chunk(len(variants))
        losses = [loss_of(part, arguments, model.config) for part in logits]
        pairs = zip(logits, losses, strict=True)
        return [SequenceClassifierOutput(loss=loss, logits=part) for part, loss in pairs]

    def weights(self, model: nn.Module, final: bool) -> dict[str, Weights]:
        return {f"r{b}": partial(loralib.at_rank, model, b) for b in self.ranks(final)}

    @staticmethod
    def _at(model: nn.Module, arguments: dict[str, Any], rank: int) -> Any:
        with loralib.at_rank(model, rank):
            return model(**arguments)


def repeated(arguments: dict[str, Any], copies: int) -> dict[str, Any]:
    """The arguments of a batch whose rows come `copies` times, all of them before any again.

    Args:
        arguments: of a padded batch, tensors (n, …); or of a packed one, tensors (T, …) and
            `cu_seqlens` (n + 1,). What is no tensor stays.
        copies: how many.
    """
    found = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            found[name] = value
        elif name == "cu_seqlens":
            starts = torch.arange(copies, device=value.device, dtype=value.dtype) * value[-1]
            ends = (starts[:, None] + value[1:]).flatten()
            found[name] = torch.cat((value[:1], ends))
        else:
            found[name] = value.repeat(copies, *(1,) * (value.dim() - 1))
    return found


class RankReport:
    """What the final metrics say about the ranks.

    Args:
        ranks: to evaluate at.
        tolerance: the smallest rank this close to the best one is reported.
        files: names of the curve and of its picture.
    """

    def __init__(self, ranks: Ranks, tolerance: float, files: tuple[str, str]) -> None:
        self.ranks, self.tolerance, self.files = ranks, tolerance, files

    def __call__(
        self, metrics: dict[str, float], main: str, title: str, folder: Path | None
    ) -> dict[str, Any]:
        """The best rank, the smallest good one, the areas; the curve goes into `folder`."""
        ranks, tolerance = self.ranks(True), self.tolerance
        values = [metrics[variant_metric(main, f"r{b}")] for b in ranks]
        found: dict[str, Any] = chosen_ranks(ranks, values, tolerance, main.endswith("loss"))
        found |= areas(ranks, values)
        if folder is None:
            return found
        names = [n for n in metrics if all(variant_metric(n, f"r{b}") in metrics for b in ranks)]
        curve = {name: [metrics[variant_metric(name, f"r{b}")] for b in ranks] for name in names}
        content = {"metric": main, **found, "tolerance": tolerance, "ranks": ranks, **curve}
        curve_file, picture = (folder / name for name in self.files)
        curve_file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if why_not := rank_curve(picture, ranks, values, found, main, title, tolerance):
            print(why_not)
        return found


def areas(ranks: list[int], values: list[float]) -> dict[str, float]:
    """AURAC: the area under the metric over the rank, in the metric's own unit.

    ∫ m(b) db / (b_K − b_1) by trapezoids, and the same over log₂ b, where every doubling of the
    rank counts alike. Of a single rank it is its value.

    Args:
        ranks: b_1 … b_K, ascending.
        values: m, one per rank.
    """
    found = {}
    for name, places in (("aurac_linear", ranks), ("aurac_log2", [math.log2(b) for b in ranks])):
        pieces = zip(itertools.pairwise(places), itertools.pairwise(values), strict=True)
        area = sum((right - left) * (one + two) / 2 for (left, right), (one, two) in pieces)
        span = places[-1] - places[0]
        found[name] = area / span if span else values[0]
    return found


def chosen_ranks(
    ranks: list[int], values: list[float], tolerance: float, smaller: bool
) -> dict[str, int]:
    """`best_rank`, and `smallest_rank` whose value is at most `tolerance` worse.

    Args:
        ranks: ascending; of equal values the lower rank's counts as better.
        values: of the metric, one per rank.
        tolerance: in the metric's own unit.
        smaller: the smaller the better.
    """
    worth = [-value if smaller else value for value in values]
    best = max(worth)
    return {
        "best_rank": ranks[worth.index(best)],
        "smallest_rank": next(
            b for b, w in zip(ranks, worth, strict=True) if w >= best - tolerance
        ),
    }
