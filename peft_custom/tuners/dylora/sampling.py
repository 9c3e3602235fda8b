"""Which rank a training step has: a sample of the distribution p_B, by seed and step alone."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from loralib.dylora import summed_scales

from ... import rng

MODES = ("normal", "frozen", "matryoshka")
DISTRIBUTIONS = "'uniform' or 'geometric(p)' with 0 < p < 1, such as 'geometric(0.15)'"


@dataclass(frozen=True)
class RankSampling:
    """How ranks are sampled while training, and what a step at a rank trains.

    P(b) is 1/(R − r_min + 1) for "uniform". For "geometric(p)" it is proportional to p(1 − p)^(b−1)
    and renormalised over r_min … R: the mass outside of these ranks is shared out in proportion.

    Attributes:
        largest: R.
        r_min: the smallest rank sampled.
        dylora_mode: "normal" trains all components of the rank, "frozen" the last of them;
            "matryoshka" draws none: a step trains the sum of all ranks from r_min on.
        dylora_dist: p_B.
        dylora_dense: the optimiser also moves the rows that a step does not train, by their
            momentum and weight decay, as the published code does.
        train_ranks: "matryoshka": the ranks that are summed, the last of them R; None: all from
            r_min on.
    """

    largest: int
    r_min: int = 1
    dylora_mode: str = "normal"
    dylora_dist: str = "uniform"
    dylora_dense: bool = False
    train_ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        r_min = self.r_min
        if not isinstance(r_min, int) or isinstance(r_min, bool) or not 1 <= r_min <= self.largest:
            raise ValueError(
                f"r_min={r_min!r}: the smallest rank is a whole number from 1 to r={self.largest}"
            )
        if self.dylora_mode not in MODES:
            raise ValueError(
                f"dylora_mode={self.dylora_mode!r}: use 'normal', 'frozen' or 'matryoshka'"
            )
        if self.weights and self.dylora_dist != "uniform":
            raise ValueError(
                f"dylora_dist={self.dylora_dist!r}: dylora_mode='matryoshka' draws no ranks; leave "
                "it out"
            )
        if self.train_ranks is not None:
            object.__setattr__(self, "train_ranks", tuple(self.train_ranks))  # hashable
            self._check_train_ranks(self.train_ranks)
        if self.dylora_dist != "uniform" and not 0.0 < self._p < 1.0:
            raise ValueError(f"dylora_dist={self.dylora_dist!r}: use {DISTRIBUTIONS}")

    def _check_train_ranks(self, ranks: Sequence[int]) -> None:
        if self.dylora_mode != "matryoshka":
            raise ValueError(
                f"train_ranks={ranks!r}: dylora_mode={self.dylora_mode!r} draws ranks from r_min "
                "to r; use it with 'matryoshka'"
            )
        rising = all(isinstance(b, int) and not isinstance(b, bool) for b in ranks)
        rising = rising and [*ranks] == sorted({*ranks})
        if not rising or not ranks or ranks[0] < self.r_min or ranks[-1] != self.largest:
            raise ValueError(
                f"train_ranks={ranks!r}: rising ranks are needed, the first at least r_min="
                f"{self.r_min}, the last r={self.largest}, which trains all components"
            )

    @property
    def _p(self) -> float:
        """p of a geometric distribution; 0 where there is none to be read."""
        found = re.fullmatch(r"geometric\(\s*([0-9.eE+-]+)\s*\)", str(self.dylora_dist))
        try:
            return float(found[1]) if found else 0.0
        except ValueError:
            return 0.0

    @cached_property
    def probabilities(self) -> dict[int, float]:
        """P(b) for b = r_min … R."""
        ranks = range(self.r_min, self.largest + 1)
        p = 0.0 if self.dylora_dist == "uniform" else self._p
        weights = [(1.0 - p) ** (b - self.r_min) for b in ranks]
        return {b: weight / sum(weights) for b, weight in zip(ranks, weights, strict=True)}

    def rank(self, seed: int, step: int) -> int:
        """The rank of a step: the same on every process and after a resume."""
        if self.weights:
            return self.largest
        if self.dylora_dist == "uniform":
            return rng.integer(self.r_min, self.largest, seed, step)
        bounds = list(accumulate(self.probabilities.values()))
        place = bisect_right(bounds, rng.uniform(seed, step))
        return min(self.r_min + place, self.largest)

    @cached_property
    def weights(self) -> list[float] | None:
        """w_i = Σ 1/b over the trained ranks b ≥ i; None where a rank is drawn."""
        if self.dylora_mode != "matryoshka":
            return None
        ranks = self.train_ranks or range(self.r_min, self.largest + 1)
        return summed_scales(ranks, self.largest)

    @property
    def frozen(self) -> bool:
        """Whether a step trains the last component only."""
        return self.dylora_mode == "frozen"
