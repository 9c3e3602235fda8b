"""Which parameters of an adapted model train, and in which optimiser groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .modules_to_save import ModulesToSaveWrapper
from .tuner_layer import iter_adapters


def trained_biases(model: nn.Module, mode: str, adapter: str) -> dict[str, nn.Parameter]:
    """The base model's biases that `bias=mode` trains beside adapter `adapter`, by name.

    Raises:
        ValueError: one of them is in half precision; what is trained must be fp32.
    """
    if mode == "none":
        return {}
    if mode == "all":
        adapters = [p for _, layer in iter_adapters(model) for p in layer.adapter_parameters()]
        wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        # an adapter's own bias, or a saved module's, is saved with that and trains in any case
        others = {id(p) for p in adapters} | {id(p) for w in wrappers for p in w.parameters()}
        found = {
            name: p
            for name, p in model.named_parameters()
            if name.rsplit(".", 1)[-1] == "bias" and id(p) not in others
        }
    else:
        found = {
            f"{name}.base_layer.bias": layer.base_layer.bias
            for name, layer in iter_adapters(model)
            if adapter in layer.adapters and getattr(layer.base_layer, "bias", None) is not None
        }
    for name, p in found.items():
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"bias={mode!r}: {name} is {p.dtype}, and what is trained must be float32; load "
                "the base in float32 or use bias='none'"
            )
    return found


def decay_groups(
    model: nn.Module, special: list[dict[str, Any]], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The special groups, then all other trainable parameters as `decay` and `no_decay`.

    Biases and the weights of normalisation layers are not decayed.
    """
    taken = {id(p) for group in special for p in group["params"]}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in taken:
                taken.add(id(p))
                (plain if norm or name == "bias" else decay).append(p)
    groups = [
        {"params": decay, "name": "decay", "lr": lr, "weight_decay": weight_decay},
        {"params": plain, "name": "no_decay", "lr": lr, "weight_decay": 0.0},
    ]
    return [*special, *(group for group in groups if group["params"])]
