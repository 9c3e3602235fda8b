"""The passes of one optimiser step, and where their random draws come from.

Most optimisers take the weights as they are: one pass. One with `sampled_params` (a variational
optimiser) perturbs them first, in each of `mc_samples` passes anew, and makes the gradients their
mean itself when a pass ends.

Every pass seeds the generators: with f(seed, step, pass) for the noise of the weights, which all
processes must share, then with f(seed, step, process, pass) for dropout, which they must not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from peft_custom.rng import bits

NOISE = 1 << 32  # stands where a process has its number


def over_samples(
    backward: Callable[[], Tensor],
    optimizer: Optimizer,
    seed: int,
    step: int,
    process: int,
    *,
    train: bool = True,
) -> Tensor:
    """Calls `backward`, once per sample of the weights where the optimiser samples them.

    Args:
        backward: one pass: gradients are added up, the loss is returned.
        optimizer: the innermost one.
        seed: of the run.
        step: index of the optimiser step.
        process: number of this process.
        train: the optimiser learns from the samples; without, it only draws them.

    Returns:
        The mean loss over the samples.
    """
    if not hasattr(optimizer, "sampled_params"):
        _seed(seed, step, process)
        return backward()
    losses = []
    for k in range(optimizer.mc_samples):
        _seed(seed, step, NOISE, k)
        with optimizer.sampled_params(train=train):
            _seed(seed, step, process, k)
            losses.append(backward())
    return torch.stack(losses).mean(0)


def _seed(*counters: int) -> None:
    torch.manual_seed(bits(*counters) % 2**63)
