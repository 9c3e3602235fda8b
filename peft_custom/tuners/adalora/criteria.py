"""What ranks the components of an adapter: one function per criterion.

A criterion scores every scalar of A, E and B. It says by its arguments' names what it looks at, all
of one shape, and a new one is one function:

    @criterion("mean_over_variance")
    def mean_over_variance(mu, sigma):
        return mu.abs() / sigma.square()

| argument | what it is |
|---|---|
| `mu` | the weights: under a variational optimiser the posterior's means |
| `sigma` | the posterior's standard deviations, from `optimizer.posterior_std(parameter)` |
| `smoothed` | Ī, moving average of the sensitivity I = \\|w·∂L/∂w\\| (Zhang et al. 2023, eq. 9) |
| `variation` | Ū, moving average of \\|I − Ī\\| (eq. 10) |

The moving averages are kept only for criteria that look at them, and only those that look at
`sigma` need an optimiser that has it. The posterior's scores are those of Chen and Garner 2024.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[..., Tensor]
INPUTS = ("mu", "sigma", "smoothed", "variation")
CRITERIA: dict[str, Score] = {}


def criterion(name: str) -> Callable[[Score], Score]:
    """Decorator: registers a score under the name that `AdaLoraConfig.criterion` takes."""

    def register(score: Score) -> Score:
        unknown = set(inputs(score)) - set(INPUTS)
        if unknown:
            raise TypeError(
                f"criterion {name!r} asks for {', '.join(sorted(unknown))}; there are "
                f"{', '.join(INPUTS)}"
            )
        CRITERIA[name] = score
        return score

    return register


def inputs(score: Score) -> tuple[str, ...]:
    """The names of what a score looks at."""
    return tuple(inspect.signature(score).parameters)


@criterion("sensitivity")
def sensitivity(smoothed: Tensor, variation: Tensor) -> Tensor:
    """Ī·Ū (Zhang et al. 2023, eq. 11)."""
    return smoothed * variation


@criterion("SNR")
def snr(mu: Tensor, sigma: Tensor) -> Tensor:
    """|μ|/σ."""
    return mu.abs() / sigma


@criterion("mean")
def mean(mu: Tensor) -> Tensor:
    """|μ|."""
    return mu.abs()


@criterion("sigma")
def precision(sigma: Tensor) -> Tensor:
    """1/σ."""
    return sigma.reciprocal()


def _excess(r: Tensor) -> Tensor:
    """g(r) = E|θ|/σ − r = √(2/π)·e^(−r²/2) − r·erfc(r/√2) for r = |μ|/σ; falls from 0.8 to 0."""
    bell = r.square().mul_(-0.5).exp_().mul_(math.sqrt(2.0 / math.pi))
    return bell.sub_((r / math.sqrt(2.0)).erfc_().mul_(r))


@criterion("E_mean_abs")
def mean_absolute(mu: Tensor, sigma: Tensor) -> Tensor:
    """E|θ| for θ ~ N(μ, σ²): |μ| + σ·g(|μ|/σ)."""
    return _excess(mu.abs() / sigma).mul_(sigma).add_(mu.abs())


@criterion("SNR_mean_abs")
def snr_mean_absolute(mu: Tensor, sigma: Tensor) -> Tensor:
    """E|θ|/√Var|θ| for θ ~ N(μ, σ²), which depends on r = |μ|/σ alone: (r + g)/√(1 − 2rg − g²).

    1.3236 at r = 0 and r for large r. Var|θ|/σ² = 1 + r² − (r + g)² is expanded by hand: as a
    difference of squares it has no correct digit in fp32 beyond r = 4000.
    """
    r = mu.abs().div_(sigma)
    g = _excess(r)
    deviation = torch.add(g, r, alpha=2.0).mul_(g).neg_().add_(1.0).sqrt_()
    return r.add_(g).div_(deviation)
