"""Which parameters weight decay pulls towards zero: all but biases and normalisation layers'.

A norm's scale has its rest at 1, not at 0, and a bias shifts what it is added to; neither makes a
model more complex by being large.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # of BatchNorm and InstanceNorm, all dimensions

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: torch's by type, others by what they look like.

    Many models bring their own, as `LlamaRMSNorm` or `Qwen3NextRMSNormGated`: "Norm" is in the
    name of the class, and its own parameters are vectors. (A linear layer with normalised weights
    may be named so too, but has a matrix.)
    """
    if isinstance(module, NORMS):
        return True
    named = "norm" in type(module).__name__.lower()
    return named and all(p.dim() <= 1 for p in module.parameters(recurse=False))


def decay_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    without: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Groups "decay" and "no_decay" of the trainable parameters, for an optimiser.

    Biases and the parameters of normalisation layers are not decayed. A parameter that occurs in
    several places is where it occurs first; empty groups are left out.

    Args:
        model: Its parameters with `requires_grad` are grouped, in the order of `parameters()`.
        lr: Learning rate of both groups.
        weight_decay: Of "decay"; that of "no_decay" is 0.
        without: Parameters left out, such as those with groups of their own.
    """
    taken = {id(p) for p in without}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for module in model.modules():
        norm = is_norm(module)
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in taken:
                taken.add(id(p))
                (no_decay if norm or name == "bias" else decay).append(p)
    groups = [
        {"name": "decay", "params": decay, "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
