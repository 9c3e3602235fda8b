"""Which parameters of the base model train beside an adapter's own."""

from __future__ import annotations

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
