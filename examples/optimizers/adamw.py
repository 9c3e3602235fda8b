"""AdamW, torch's: p ← p(1 − lr·wd), then p ← p − lr·m̂/(√v̂ + eps)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from examples.cli.fields import option
from examples.methods.registry import BuiltOptimizer, RunInfo, register_optimizer


@dataclass(frozen=True)
class AdamWOptions:
    adam_beta1: float = option(0.9, "decay of the mean gradient", low=0, high=0.999999)
    adam_beta2: float = option(0.999, "decay of the mean square", low=0, high=0.999999)
    adam_epsilon: float = option(1e-8, "added to the root", low=0)


def build(groups: list[dict[str, Any]], options: AdamWOptions, run: RunInfo) -> BuiltOptimizer:
    """AdamW over the groups, in one kernel where possible.

    Under a GradScaler the fused kernel would decide by itself to skip a step, so it is not used.
    """
    import torch

    parameters = [p for group in groups for p in group["params"]]
    fused = not run.fp16 and all(p.is_floating_point() for p in parameters)
    return BuiltOptimizer(
        torch.optim.AdamW(
            groups,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            fused=fused,
        )
    )


register_optimizer("adamw", AdamWOptions, build, "Adam with decoupled weight decay")
