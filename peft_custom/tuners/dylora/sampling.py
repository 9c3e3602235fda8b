"""Which rank a training step has: a sample of the distribution p_B, by seed and step alone."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

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
    """

    largest: int
    r_min: int = 1
    dylora_mode: str = "normal"
    dylora_dist: str = "uniform"
    dylora_dense: bool = False

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
        if self.dylora_dist != "uniform" and not 0.0 < self._p < 1.0:
            raise ValueError(f"dylora_dist={self.dylora_dist!r}: use {DISTRIBUTIONS}")

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
        """w_i = Σ 1/b over the ranks b ≥ i from r_min to R; None where a rank is drawn."""
        if self.dylora_mode != "matryoshka":
            return None
        ranks = range(self.r_min, self.largest + 1)
        return [sum(1.0 / b for b in ranks if b >= i) for i in range(1, self.largest + 1)]

    @property
    def frozen(self) -> bool:
        """Whether a step trains the last component only."""
        return self.dylora_mode == "frozen"
