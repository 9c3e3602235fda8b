"""The passes of one optimiser step, and where their random draws come from.

Most optimisers take the weights as they are: one pass. A `WeightSampler` (a variational optimiser)
draws a sample of them for each of its passes, and makes the gradient their mean itself.

Every pass seeds the generators: with f(seed, step, pass) for the noise of the weights, which all
processes must share, then with f(seed, step, process, pass) for dropout, which they must not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from peft_custom.rng import bits

NOISE = 1 << 32  # stands where a process has its number


class WeightSampler(Protocol):
    """An optimiser that takes the gradient at samples of the weights.

    Attributes:
        mc_samples: passes per optimiser step, each at a sample of its own.
    """

    mc_samples: int

    def sampled_params(self, *, train: bool) -> AbstractContextManager[object]:
        """The weights are a sample within the context; `train`: the optimiser learns from it."""
        ...


def over_samples(
    backward: Callable[[], Tensor],
    sampler: WeightSampler | None,
    seed: int,
    step: int,
    process: int,
    *,
    train: bool = True,
) -> Tensor:
    """Calls `backward`: once, or once per sample of the weights.

    Args:
        backward: one pass: gradients are added up, the loss is returned.
        sampler: the optimiser where it samples the weights, else None.
        seed: of the run.
        step: index of the optimiser step.
        process: number of this process.
        train: the optimiser learns from the samples; without, it only draws them.

    Returns:
        The mean loss over the samples.
    """
    if sampler is None:
        _seed(seed, step, process)
        return backward()
    losses = []
    for k in range(sampler.mc_samples):
        _seed(seed, step, NOISE, k)
        with sampler.sampled_params(train=train):
            _seed(seed, step, process, k)
            losses.append(backward())
    return torch.stack(losses).mean(0)


def _seed(*counters: int) -> None:
    torch.manual_seed(bits(*counters) % 2**63)
