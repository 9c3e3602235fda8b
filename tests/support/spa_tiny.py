"""Small pruned models that the tests of structured pruning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_custom import (
    BlockPruneConfig,
    PeftModel,
    SplopaConfig,
    SploraConfig,
    TrainingHooks,
    attach,
    get_peft_model,
)
from support.bim_tiny import base, batches

CONFIGS = {"block_prune": BlockPruneConfig, "splopa": SplopaConfig, "splora": SploraConfig}
SHORT = {"mask_block_rows": 4, "mask_block_cols": 8, "final_threshold": 0.5, "warmup_steps": 1}
PROTOTYPES = {"num_prototypes": 5, "prototype_rank": 2}


def tiny(method: str = "splopa", kind: str = "Bert", seed: int = 0, **options: Any) -> PeftModel:
    """A two-layer classifier of hidden size 16, feed-forward 24, two heads."""
    model = base(kind, seed)
    own = PROTOTYPES if method == "splopa" else {}
    config = CONFIGS[method](task_type="SEQ_CLS", **{**SHORT, **own, **options})
    return get_peft_model(model, config)


def linear(config: Any, *sizes: int, seed: int = 0) -> PeftModel:
    """One linear layer, `net.0`; its weight counts from 0 and its bias is 0 at sizes 4, 4."""
    torch.manual_seed(seed)
    layer = nn.Linear(*sizes)
    if sizes == (4, 4):
        with torch.no_grad():
            layer.weight.copy_(torch.arange(16.0).view(4, 4))
            layer.bias.zero_()
    config.target_modules = ["0"]
    return get_peft_model(nn.Sequential(layer), config)


def parameter(model: nn.Module, ending: str) -> nn.Parameter:
    """The one parameter of that name."""
    [found] = [p for name, p in model.named_parameters() if name.endswith(ending)]
    return found


def train(
    model: PeftModel, steps: int = 8, total: int = 8, lr: float = 1e-2, start: int = 0
) -> TrainingHooks:
    """Some steps of AdamW, under attached hooks."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr, 0.01))
    hooks = attach(model, optimizer, total_steps=total)
    go_on(model, optimizer, start, steps)
    return hooks


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps `start` to `stop` of the same data."""
    model.train()
    for batch in batches(stop)[start:]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
